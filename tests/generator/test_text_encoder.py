"""`TextEncoder` returns the states of each text encoded alone, and `PackedText` validates its fields."""

import threading

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from cat_fast.complexity.sentence_package import HUB_NAME, package_folder
from cat_fast.errors import UserError
from cat_fast.generator import PackedText, text_models
from cat_fast.generator.text_encoder import TextEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "house", "by", "the", "sea"]
TEXTS = ["a red house by the sea", "house", "", "the red sea"]
SMALL = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL, **HEADS)),
    "t5": lambda: T5Model(
        T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    ),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config={**SMALL, **HEADS, "max_position_embeddings": 16, "eos_token_id": 3},
            vision_config={**SMALL, **HEADS, "image_size": 16, "patch_size": 8},
        )
    ),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    """Save a model with random weights and a word tokenizer that adds [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path)
    return tmp_path


def test_states_equal_those_of_each_text_encoded_alone(folder):
    encoder = TextEncoder(folder)
    packed = encoder(TEXTS)
    assert packed.cu_seqlens.diff().tolist() == [
        8,
        3,
        0,
        5,
    ]  # two special tokens each; none for the empty text
    assert (packed.max_seqlen, encoder.dim) == (8, 32)
    model = AutoModel.from_pretrained(folder).eval()
    model = {"t5": lambda: model.encoder, "clip": lambda: model.text_model}.get(
        model.config.model_type, lambda: model
    )()
    for text, part in zip(TEXTS, packed.split(), strict=True):
        if text:
            ids = torch.tensor([[2, *map(WORDS.index, text.split()), 3]])
            torch.testing.assert_close(part.tokens, model(input_ids=ids).last_hidden_state[0])
    assert not packed.tokens.requires_grad


def test_a_packaged_encoder_is_found_by_name_and_saved_without_a_path(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text_models, "PACKAGED", {"org/packaged": lambda: folder, "org/absent": lambda: None})
    for given in ("org/packaged", str(folder)):
        encoder = TextEncoder(given, download=False)
        assert encoder.name == "org/packaged"
        encoder.save_pretrained(tmp_path / "saved")
        assert str(folder) not in (tmp_path / "saved" / "config.json").read_text()
        assert TextEncoder.from_pretrained(tmp_path / "saved").fingerprint() == encoder.fingerprint()
    with pytest.raises(UserError, match="'org/absent' is missing"):
        TextEncoder("org/absent", download=False)


def test_the_encoder_of_the_distilled_scorer_is_that_of_its_package():
    found = text_models.find_text_model(HUB_NAME)
    assert found is not None
    assert found == package_folder()
    assert (found / "config.json").is_file()


def test_long_texts_are_truncated_and_unknown_folders_rejected(folder):
    assert TextEncoder(folder, max_tokens=5)(TEXTS).cu_seqlens.diff().tolist() == [5, 3, 0, 5]
    with pytest.raises(UserError, match="texts: expected at least one"):
        TextEncoder(folder)([])
    with pytest.raises(UserError, match="text encoder"):
        TextEncoder(folder / "nothing")


def test_a_thread_does_not_change_the_truncation_of_another(folder, monkeypatch):
    encoder = TextEncoder(folder, max_tokens=5)
    configure, counted = encoder.tokenizer.set_truncation_and_padding, []
    other = threading.Thread(target=lambda: counted.extend(encoder.count_tokens(TEXTS[:1], truncation=False)))

    def interrupted(**options):
        configure(**options)
        if threading.current_thread() is threading.main_thread():
            other.start()
            other.join(timeout=0.2)  # it waits for this call

    monkeypatch.setattr(encoder.tokenizer, "set_truncation_and_padding", interrupted)
    assert encoder.count_tokens(TEXTS[:1]) == [5]
    other.join()
    assert counted == [8]


def test_fingerprint_changes_with_any_weight_but_not_with_dtype(folder):
    encoder = TextEncoder(folder)
    own = encoder.fingerprint()
    assert len(own) == 16
    assert TextEncoder(folder).to(dtype=torch.bfloat16).fingerprint() == own
    seen = {own}
    for weight in encoder.model.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1
        other = TextEncoder(folder)
        other.model.load_state_dict(encoder.model.state_dict())
        seen.add(other.fingerprint())
    assert len(seen) == 1 + len(list(encoder.model.parameters()))


def test_split_and_concat_of_texts_are_inverse():
    texts = [torch.randn(n, 3) for n in (4, 0, 2)]
    packed = PackedText.of(texts)
    for part, text in zip(packed.split(), texts, strict=True):
        assert torch.equal(part.tokens, text)
    again = PackedText.concat(packed.split())
    assert torch.equal(again.tokens, packed.tokens)
    assert torch.equal(again.cu_seqlens, packed.cu_seqlens)
    assert (again.max_seqlen, len(again)) == (4, 3)
    null = packed.null()
    assert (len(null), null.tokens.shape, null.max_seqlen) == (3, (0, 3), 0)
    assert PackedText.concat([packed, null]).cu_seqlens.tolist() == [0, 4, 4, 6, 6, 6, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3)}, r"tokens: expected \(L, text_dim\)"),
        ({"tokens": torch.zeros(3, 2, dtype=torch.int64)}, "of a float dtype"),
        ({"cu_seqlens": torch.tensor([0, 1, 3])}, r"\(S \+ 1,\) int32"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, "S >= 1"),
        ({"cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32)}, "increase from 0 to the 3 tokens"),
        ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, "increase from 0 to the 3 tokens"),
        ({"max_seqlen": 1}, "max_seqlen: expected at least 2, the longest text, got 1"),
    ],
)
def test_inconsistent_fields_are_rejected(change, message):
    fields = {"tokens": torch.zeros(3, 2), "cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32)}
    with pytest.raises(UserError, match=message):
        PackedText(**{**fields, "max_seqlen": 2, **change})
    with pytest.raises(UserError, match="all of the same width"):
        PackedText.of([torch.zeros(1, 2), torch.zeros(1, 3)])
