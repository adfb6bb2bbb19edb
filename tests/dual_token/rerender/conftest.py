"""Tiny diffusion models on disk: a Stable Diffusion folder, and pipelines of this package."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cat_fast.generator.diffusion import make_schedule
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.inference import CATPipeline
from tests.dual_token.rerender.test_trajectory import stable_diffusions_schedule
from tests.inference.pipeline.test_text_pipeline import make_parts
from tests.inference.tiny_encoder import save_encoder

WIDTH, LENGTH = 16, 12


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """Folder of a `StableDiffusionPipeline` with random weights, at 16 px."""
    root = tmp_path_factory.mktemp("sd")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "r", "e", "re", "d</w>", "red</w>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = CLIPTokenizer(
        str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=LENGTH, unk_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=2, sample_size=16,
        layers_per_block=1, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH,
        attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=stable_diffusions_schedule(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(root / "pipe")  # fmt: skip
    return root / "pipe"


@pytest.fixture(scope="session")
def cat_pipelines(tmp_path_factory):
    """Folders of text-conditional pipelines at 64 px: one that predicts noise, and a flow."""
    encoder = TextEncoder(save_encoder(tmp_path_factory.mktemp("encoder")))
    folders = {}
    for kind, changes in (("epsilon", {}), ("flow", {"noise_shift_tokens": 4.0, "pooled_text": True})):
        tokenizer, transformer, schedule = make_parts(**changes)
        pipeline = CATPipeline(
            tokenizer, transformer, make_schedule("flow") if kind == "flow" else schedule, encoder,
            labels=["a", "b"], resolution=64,
        )  # fmt: skip
        folders[kind] = tmp_path_factory.mktemp(kind) / "pipe"
        pipeline.save_pretrained(folders[kind])
    return folders
