"""Vision-language model run by transformers, on any of its devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LogitsProcessorList

from cat_fast.complexity.scorers.language_model.generated_tokens import ReplyReader
from cat_fast.complexity.scorers.language_model.loading import choose_device, choose_dtype, fingerprint
from cat_fast.complexity.scorers.language_model.replies import ModelReply
from cat_fast.errors import UserError, one_line

PROMPT = "{prompt}"
"""Place of the prompt in a template."""
_PROBE = Image.new("RGB", (224, 224), "gray"), "Describe the image."
_SPECIAL = ("bos_token_id", "decoder_start_token_id", "pad_token_id")


class TransformersVision:
    """Image-text-to-text model of transformers, such as LLaVA, Qwen-VL, InstructBLIP or SmolVLM.

    Replies are greedy, without the penalties and sampling of the model's published configuration. They depend
    on the other images of a batch by rounding errors only.
    """

    concurrent = False

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: "str | torch.dtype | None" = None,
        batch_size: int = 8,
        template: str | None = None,
    ) -> None:
        """Load the model and its processor.

        Args:
            model: folder, or name on the Hugging Face hub. Code of the model's authors is not run.
            device: by default CUDA if available, else the CPU.
            dtype: by default bfloat16; float32 on the CPU.
            batch_size: images per forward pass; lower it if you run out of memory.
            template: prompt of a model without a chat template, such as "USER: <image> {prompt} ASSISTANT:".
                By default the prompt alone, as InstructBLIP expects it. Chat templates take precedence.

        Raises:
            UserError: an argument is not valid, or the model cannot be loaded.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if template is not None and template.count(PROMPT) != 1:
            raise UserError(f"the template must contain {PROMPT} once, got {template!r}")
        self.batch_size = batch_size
        self._template = template or PROMPT
        self._device = choose_device(device)
        dtype = choose_dtype(dtype, self._device, torch.bfloat16)
        self._model, self._processor = _load(model, self._device, dtype)
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # replies follow the prompt
        self._generation = _greedy(self._model, tokenizer)
        self._ends: list[int] = self._generation.eos_token_id or []
        self._reader = ReplyReader(tokenizer, self._ends, self._device)
        self.name = f"vlm:{Path(model).name if Path(model).exists() else model}"
        chat = self._processor.chat_template
        images = self._processor.image_processor.to_json_string()
        weights = fingerprint(self._model, tokenizer, chat if isinstance(chat, str) else repr(chat))
        self._require_images()
        self.identity = f"{weights}\0{self._template}\0{images}"

    def reply_many(
        self, requests: Sequence[tuple[Image.Image, str]], max_new_tokens: int, pattern: str | None = None
    ) -> list[ModelReply | UserError]:
        """Return the reply to each image and prompt, in order; `pattern` is ignored.

        An image that the model's processor rejects, such as one that is too narrow, has a UserError.

        Raises:
            UserError: a batch does not fit in memory, or the model cannot process any image.
        """
        results: list[ModelReply | UserError] = []
        for start in range(0, len(requests), self.batch_size):
            results += self._batch(requests[start : start + self.batch_size], max_new_tokens)
        return results

    def _batch(
        self, requests: Sequence[tuple[Image.Image, str]], max_new_tokens: int
    ) -> list[ModelReply | UserError]:
        try:
            inputs = self._inputs(requests)
        except UserError as error:
            if len(requests) == 1:
                return [error]
            return [reply for request in requests for reply in self._batch([request], max_new_tokens)]
        return [*self._generate(inputs, max_new_tokens, len(requests))]

    def _inputs(self, requests: Sequence[tuple[Image.Image, str]]) -> Any:
        texts = [self._text(prompt) for _, prompt in requests]
        images = [[image] for image, _ in requests]
        bos = self._processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        try:
            inputs = self._processor(images=images, text=texts, padding=True, return_tensors="pt", **options)
        except Exception as error:  # processors raise many types, and so do templates
            raise UserError(f"the model's processor rejects the image ({one_line(error)[:200]})") from error
        return inputs.to(self._device, self._model.dtype)

    def _require_images(self) -> None:
        """Raise UserError if prompts do not contain the image, which some models would then ignore."""
        try:
            inputs = self._inputs([_PROBE])
            token = _image_token(self._model.config)
            if token is None or "input_ids" not in inputs or (inputs["input_ids"] == token).any():
                return
            problem = "its token is missing"
        except UserError as error:
            problem = str(error)
        raise UserError(
            f"{self.name}: the prompt does not contain the image ({problem}); a model without a chat template"
            ' needs a template with its image token, such as "USER: <image> {prompt} ASSISTANT:"'
        )

    def _text(self, prompt: str) -> str:
        """Return a prompt as a user's message with one image."""
        if not self._processor.chat_template:
            return self._template.replace(PROMPT, prompt)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        try:
            return self._processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs
            raise UserError(f"the model's chat template cannot be rendered ({one_line(error)})") from error

    def _generate(self, inputs: Any, max_new_tokens: int, images: int) -> list[ModelReply]:
        recorder = self._reader.recorder()
        self._generation.max_new_tokens = max_new_tokens
        try:
            with torch.no_grad():
                output = self._model.generate(
                    **inputs,
                    generation_config=self._generation,
                    logits_processor=LogitsProcessorList([recorder]),
                )
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory with {images} images; lower the batch size") from error
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise UserError(f"{self.name}: the model cannot reply ({one_line(error)[:300]})") from error
        # Some models return the prompt, others the reply alone; there was one step per token of the reply.
        return self._reader.read([row[-len(recorder.steps) :] for row in output.tolist()], recorder)


def _greedy(model: Any, tokenizer: Any) -> GenerationConfig:
    """Return a greedy configuration with the model's special tokens, and remove all others from the model."""
    ends: set[int] = {tokenizer.eos_token_id} - {None}
    special: dict[str, int] = {}
    for module in model.modules():  # a language model inside may generate
        config = getattr(module, "generation_config", None)
        if config is None:
            continue
        end = config.eos_token_id
        ends |= {*(end if isinstance(end, list) else [end])} - {None}
        for name in _SPECIAL:
            if getattr(config, name, None) is not None:
                special.setdefault(name, getattr(config, name))
        module.generation_config = GenerationConfig()
    if "pad_token_id" not in special:
        pad = tokenizer.pad_token_id
        special["pad_token_id"] = pad if pad is not None else min(ends, default=0)
    return GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, eos_token_id=sorted(ends) or None, **special
    )


def _image_token(config: Any) -> int | None:
    """Return the token that stands for an image in prompts; None for models without one."""
    names = ("image_token_id", "image_token_index")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _load(model: str | Path, device: torch.device, dtype: str | torch.dtype) -> tuple[Any, Any]:
    try:
        processor: Any = AutoProcessor.from_pretrained(str(model))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(str(model), dtype=dtype)
        loaded = loaded.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(f"{model}: the model does not fit in the memory of {device}") from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{model}: not an image-text-to-text model that transformers can load ({one_line(error)[:300]})"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{model}: the folder has no processor of images and text")
    return loaded, processor
