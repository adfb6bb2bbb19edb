"""The calls that diffusers makes on a transformer, on `DiT`: files, dtypes, devices, casting, training."""

import copy
import inspect
import json
import os

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from accelerate.utils import send_to_device
from diffusers.models import modeling_utils
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from cat_fast.generator import DiT
from cat_fast.generator.blocks import BlockContext

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
OPTIONS = {
    "class": {},
    "text": {"text_dim": 12, "shared_adaln": True, "qk_norm": True, "rope": True, "swiglu": True},
}


@pytest.fixture(params=OPTIONS)
def case(request, make_dit, random_mix, random_texts):
    """A model and its forward arguments, of the published architecture and with all options."""
    model, inputs = make_dit(**OPTIONS[request.param]), {"packed": random_mix(4)}
    if model.config.text_dim:
        inputs["text"] = random_texts(4)
    return model, inputs


@pytest.fixture
def model(make_dit):
    return make_dit()


@pytest.fixture
def inputs(random_mix):
    return {"packed": random_mix(4)}


@torch.no_grad()
def predict(model, inputs):
    return model(**inputs).sample


def gradients(model, inputs):
    """Return the gradients of all parameters for a fixed loss and fixed dropout."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    model(**inputs, generator=generator).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(got, expected):
    return ((got.float() - expected).abs().max() / expected.abs().max()).item()


# Outputs


def test_forward_signature():
    parameters = inspect.signature(DiT.forward).parameters
    assert list(parameters)[1:4] == ["packed", "timesteps", "labels"]
    assert parameters["return_dict"].default is True


def test_output_has_the_shape_and_dtype_of_the_tokens(case):
    model, inputs = case
    output = predict(model, inputs)
    assert (output.shape, output.dtype) == (inputs["packed"].tokens.shape, torch.float32)


def test_return_dict(case):
    model, inputs = case
    with torch.no_grad():
        output, values = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(output, Transformer2DModelOutput)
    assert isinstance(values, tuple)
    assert len(values) == len(output.to_tuple()) == 1
    for sample in (values[0], output[0], output["sample"], output.to_tuple()[0]):
        assert torch.equal(sample, output.sample)


def test_forward_is_deterministic(case):
    model, inputs = case
    assert torch.equal(predict(model, inputs), predict(model, inputs))


def test_copies_predict_the_same(case):
    model, inputs = case
    assert torch.equal(predict(copy.deepcopy(model), inputs), predict(model, inputs))


# Files


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_save_and_load(case, tmp_path, safe_serialization):
    model, inputs = case
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    suffix = "safetensors" if safe_serialization else "bin"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", f"diffusion_pytorch_model.{suffix}"}
    loaded = DiT.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.position_frame == model.config.position_frame
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


@pytest.mark.parametrize(
    "options",
    [{"low_cpu_mem_usage": False}, {"use_safetensors": True}, {"disable_mmap": True}],
    ids=lambda options: next(iter(options)),
)
def test_loading_options(model, inputs, tmp_path, options):
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(DiT.from_pretrained(tmp_path, **options), inputs), predict(model, inputs))


@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize("variant", ["fp16", "ema"])
def test_variants(model, inputs, tmp_path, variant, safe_serialization):
    model.save_pretrained(tmp_path, variant=variant, safe_serialization=safe_serialization)
    loaded = DiT.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        DiT.from_pretrained(tmp_path)


def test_subfolder(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "transformer")
    loaded = DiT.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
def test_sharded_checkpoints(case, tmp_path, monkeypatch, variant, parallel):
    model, inputs = case
    model.save_pretrained(tmp_path, max_shard_size="100KB", variant=variant)
    index = INDEX if variant is None else f"diffusion_pytorch_model.safetensors.index.{variant}.json"
    shards = json.loads((tmp_path / index).read_text())["weight_map"]
    assert shards.keys() == model.state_dict().keys()
    assert len(set(shards.values())) == len(list(tmp_path.glob("*.safetensors"))) > 2
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", parallel)
    loaded = DiT.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


def test_saving_again_replaces_the_shards(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    names = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == names
    assert torch.equal(predict(DiT.from_pretrained(tmp_path), inputs), predict(model, inputs))


def test_missing_and_unexpected_keys_are_reported(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state["extra.weight"] = state.pop("final_layer.linear.weight")
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    _, report = DiT.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == ["final_layer.linear.weight"]
    assert report["unexpected_keys"] == ["extra.weight"]
    assert not report["mismatched_keys"]


def test_mismatched_shapes_raise_unless_ignored(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"y_embedder.embedding_table.weight expected shape"):
        DiT.from_pretrained(tmp_path, num_classes=11)
    options = {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}
    loaded = DiT.from_pretrained(tmp_path, num_classes=11, **options)
    assert loaded.y_embedder.embedding_table.weight.shape == (12, 48)
    assert torch.equal(loaded.x_embedder.proj.weight, model.x_embedder.proj.weight)


@pytest.mark.parametrize("damage", ["no config", "no weights", "no shard", "truncated", "pickle only"])
def test_damaged_folders_raise(model, tmp_path, damage):
    model.save_pretrained(
        tmp_path,
        safe_serialization=damage != "pickle only",
        max_shard_size="100KB" if damage == "no shard" else "10GB",
    )
    if damage == "no config":
        (tmp_path / "config.json").unlink()
    elif damage == "truncated":
        os.truncate(tmp_path / WEIGHTS, 1000)
    elif damage != "pickle only":
        next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match=r"."):
        DiT.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True)


# Configuration


def test_config_round_trip(case, tmp_path):
    model, _ = case
    model.save_config(tmp_path)
    loaded = DiT.from_config(DiT.load_config(tmp_path))
    assert loaded.to_json_string() == model.to_json_string()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert json.loads(model.to_json_string())["_class_name"] == "DiT"


def test_from_config_overrides_arguments_and_returns_unused_ones(model):
    other, unused = DiT.from_config(model.config, depth=3, unknown=1, return_unused_kwargs=True)
    assert (len(other.blocks), other.config.depth, unused) == (3, 3, {"unknown": 1})
    assert other.config.hidden_size == model.config.hidden_size


def test_attributes(model):
    model.note = 5
    assert model.note == 5
    with pytest.warns(FutureWarning, match="num_classes"):
        assert model.num_classes == 10
    with pytest.raises(AttributeError, match="'DiT' object has no attribute 'missing'"):
        _ = model.missing


@pytest.mark.parametrize("trainable", [False, True])
def test_num_parameters(model, trainable):
    model.final_layer.requires_grad_(not trainable)
    kept = [p for p in model.parameters() if p.requires_grad or not trainable]
    tables = model.y_embedder.embedding_table.weight, model.ratio_embedder.embedding_table.weight
    expected = sum(p.numel() for p in kept)
    assert model.num_parameters(only_trainable=trainable) == expected
    without = model.num_parameters(only_trainable=trainable, exclude_embeddings=True)
    assert expected - without == sum(table.numel() for table in tables)
    assert model.get_memory_footprint() == 4 * sum(p.numel() for p in model.parameters())


# Dtypes


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loading_with_a_dtype(model, inputs, tmp_path, dtype, low_cpu_mem_usage):
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {loaded.dtype} == {p.dtype for p in loaded.parameters()} == {dtype}
    output = predict(loaded, inputs)
    assert output.dtype == dtype
    assert relative_error(output, predict(model, inputs)) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casting_and_saving_with_a_dtype(case, tmp_path, dtype):
    model, inputs = case
    expected = predict(model, inputs)
    model.to(dtype).save_pretrained(tmp_path)
    output = predict(model, inputs)
    assert output.dtype == dtype
    assert relative_error(output, expected) < 0.05
    assert torch.equal(predict(DiT.from_pretrained(tmp_path, torch_dtype=dtype), inputs), output)
    assert DiT.from_pretrained(tmp_path, torch_dtype=torch.float32).dtype == torch.float32


def test_autocast(case):
    model, inputs = case
    expected = predict(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(predict(model, inputs), expected) < 0.05


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16], ids=str)
def test_layerwise_casting(case, storage):
    model, inputs = case
    expected, size = predict(model, inputs), model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    output = predict(model, inputs)
    assert model.blocks[0].attn.qkv.weight.dtype == storage
    assert model.x_embedder.proj.weight.dtype == model.dtype == output.dtype == torch.float32
    assert model.get_memory_footprint() < size * (0.1 + storage.itemsize / 4)
    assert relative_error(output, expected) < 0.2


def test_training_with_layerwise_casting(case):
    model, inputs = case
    model.train().enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert all(gradient is not None for gradient in gradients(model, inputs).values())


# Devices


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", "balanced", {"": "cpu"}, {"": torch.device("cpu")}], ids=str
)
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_device_map(model, inputs, tmp_path, device_map, shard):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = DiT.from_pretrained(tmp_path, device_map=device_map)
    assert {str(device) for device in loaded.hf_device_map.values()} == {"cpu"}
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


def test_device_map_by_module(case, tmp_path):
    model, inputs = case
    model.save_pretrained(tmp_path / "model")
    devices = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    devices |= {"blocks.0": "cpu", "blocks.1": "disk"}
    loaded = DiT.from_pretrained(tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in loaded.blocks[1].parameters()} == {"meta"}
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


def test_automatic_device_map_never_splits_a_block(case, tmp_path):
    model, inputs = case
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    available = model.get_memory_footprint() // 2
    loaded = DiT.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": available},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    blocks = [name for name in loaded.hf_device_map if name.startswith("blocks")]
    assert blocks
    assert all(name.count(".") <= 1 for name in blocks)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


@pytest.mark.parametrize("device_map", ["nowhere", {"blocks": "cpu"}], ids=str)
def test_invalid_device_maps_raise(model, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device"):
        DiT.from_pretrained(tmp_path, device_map=device_map)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_sequential_offload(case, tmp_path, kind):
    model, inputs = case
    expected = predict(model, inputs)
    if kind == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(predict(model, inputs), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "leaf_level"},
        {"offload_type": "block_level", "num_blocks_per_group": 2, "to_disk": True},
        {"offload_type": "leaf_level", "to_disk": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_group_offload(case, tmp_path, options):
    model, inputs = case
    expected, cpu = predict(model, inputs), torch.device("cpu")
    options = dict(options)
    if options.pop("to_disk", False):
        options["offload_to_disk_path"] = str(tmp_path)
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    assert torch.equal(predict(model, inputs), expected)


def test_block_arguments_move_between_devices(random_texts):
    """Blocks on several devices get their arguments from accelerate, which calls `to`."""
    rows = torch.zeros(6, 48)
    context = BlockContext(
        condition=rows,
        modulation=None,
        cu_seqlens=torch.arange(7, dtype=torch.int32),
        max_seqlen=1,
        rotation=rows,
        text=random_texts(0),
    )
    moved = send_to_device(context, torch.device("meta"))
    tensors = moved.condition, moved.cu_seqlens, moved.rotation, moved.text.tokens, moved.text.cu_seqlens
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.modulation, moved.max_seqlen) == (None, 1)


def test_packed_inputs_move_between_devices(random_mix):
    moved = send_to_device({"packed": random_mix(0)}, torch.device("meta"))["packed"]
    assert {moved.tokens.device.type, moved.ratio.device.type, moved.label.device.type} == {"meta"}


def test_construction_without_memory(case):
    model, inputs = case
    with init_empty_weights():
        empty = DiT.from_config(model.config)
    assert empty.device.type == "meta"
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(predict(empty.eval(), inputs), predict(model, inputs))


# Training


def test_training_step_gives_every_parameter_a_gradient(case):
    model, inputs = case
    for name, gradient in gradients(model.train(), inputs).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


def test_gradient_checkpointing_switches():
    model = DiT(in_channels=4, hidden_size=48, depth=1, num_heads=2)
    states = [model.is_gradient_checkpointing]
    for switch in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        switch()
        states.append(model.is_gradient_checkpointing)
    assert states == [False, True, False]


def test_gradient_checkpointing_gives_equal_gradients(case):
    model, inputs = case
    plain = gradients(model.train(), inputs)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, inputs)
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_checkpointing_covers_every_block_in_training_only(model, inputs, grad):
    called = []

    def checkpoint(block, *arguments):
        called.append(block)
        return block(*arguments)

    model.enable_gradient_checkpointing(checkpoint)
    with torch.set_grad_enabled(grad):
        model(**inputs)
    assert called == (list(model.blocks) if grad else [])


@pytest.mark.parametrize("foreach", [False, True])
def test_training_with_ema(case, tmp_path, foreach):
    model, inputs = case
    start = [p.detach().clone() for p in model.parameters()]
    ema = EMAModel(model.parameters(), decay=0.5, foreach=foreach, model_cls=DiT, model_config=model.config)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    gradients(model, inputs)
    optimizer.step()
    ema.step(model.parameters())
    decay = ema.cur_decay_value
    expected = [decay * old + (1 - decay) * new for old, new in zip(start, model.parameters(), strict=True)]
    torch.testing.assert_close(list(ema.shadow_params), expected)

    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, DiT)
    assert loaded.optimization_step == 1
    loaded.store(model.parameters())
    trained = predict(model.eval(), inputs)
    loaded.copy_to(model.parameters())
    averaged = predict(model, inputs)
    assert torch.equal(averaged, predict(DiT.from_pretrained(tmp_path), inputs))
    assert not torch.equal(averaged, trained)
    loaded.restore(model.parameters())
    assert torch.equal(predict(model, inputs), trained)


# Compilation


@pytest.mark.parametrize("options", OPTIONS)
def test_compiling_repeated_blocks(make_dit, random_mix, random_texts, options):
    model, inputs = make_dit(hidden_size=96, **OPTIONS[options]), {"packed": random_mix(4)}
    if model.config.text_dim:
        inputs["text"] = random_texts(4)
    expected = predict(model, inputs)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert relative_error(predict(model, inputs), expected) <= 1e-5
