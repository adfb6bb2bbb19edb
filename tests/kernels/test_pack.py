"""pack and unpack: every backend of this machine against the reference, bit for bit."""

from itertools import chain, product

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.kernels import backends
from cat_fast.kernels.pack.op import pack, unpack
from cat_fast.kernels.pack.reference import pack_reference, patchify, unpack_reference, unpatchify

BACKENDS = [
    ("cpp", "cpu"),
    ("triton", "cpu"),  # interpreted
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (channels, patch size, grids): mixed ratios, odd sizes, fewer and more channels than a tile, no tokens.
CASES = [
    (16, 2, [(8, 8), (4, 4), (2, 2), (8, 8)]),
    (4, 2, [(3, 5), (1, 1)]),
    (17, 1, [(9, 11), (1, 63)]),
    (70, 3, [(3, 4)]),
    (8, 4, [(2, 3), (0, 3)]),
    (1, 1, [(1, 1000)]),
    (16, 2, [(0, 4)]),
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x[None].to(memory_format=torch.channels_last)[0],
    "columns_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second": lambda x: torch.stack([x, x], dim=-1).flatten(2)[:, :, ::2],
    "unaligned_rows": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
}


@pytest.fixture(params=BACKENDS, ids="-".join)
def device(request, force):
    """Force a backend, so that the reference is not compared with itself, and return its device."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if name == "triton" and backends.triton_is_interpreted() != (device == "cpu"):
        pytest.skip("Triton's interpreter runs CPU tensors, its compiler CUDA tensors")
    force("pack", name)
    return device


@pytest.fixture
def operators(device):
    """Return pack and unpack as operators of torch's dispatcher."""
    suffix = "_triton" if backends.forced_backend("pack") == "triton" else ""
    return tuple(getattr(torch.ops.cat_fast, name + suffix).default for name in ("pack", "unpack"))


def random_latents(channels, patch, grids, *, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(channels, h * patch, w * patch) for h, w in grids]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "patch", "grids"), CASES, ids=str)
def test_pack_and_unpack_are_exact_in_every_memory_order(device, channels, patch, grids, dtype):
    latents = random_latents(channels, patch, grids, device=device, dtype=dtype)
    want = pack_reference(latents, patch)
    for layout in LAYOUTS.values():
        assert torch.equal(pack([layout(x) for x in latents], patch), want)
    for tokens in (want, torch.cat([want, want], dim=1)[:, : want.shape[1]], want.t().contiguous().t()):
        got = unpack(tokens, grids, patch)
        assert same(got, latents)
        assert all(x.is_contiguous() for x in got)


def test_latents_of_different_memory_orders_are_packed_together(device):
    latents = random_latents(16, 2, [(4, 8)] * len(LAYOUTS), device=device)
    mixed = [layout(x) for layout, x in zip(LAYOUTS.values(), latents, strict=True)]
    batch = list(torch.stack(latents).to(memory_format=torch.channels_last))
    assert torch.equal(pack(mixed, 2), pack_reference(latents, 2))
    assert torch.equal(pack(batch, 2), pack_reference(latents, 2))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_features_are_in_the_order_of_dits_final_layer(patch_size):
    latent = torch.randn(3, 8, 4)
    h, w = 8 // patch_size, 4 // patch_size
    tokens = patchify(latent, patch_size)
    n_h_w_p_q_c = tokens.view(h, w, patch_size, patch_size, 3)
    for c, y, x in product(range(3), range(8), range(4)):
        (i, p), (j, q) = divmod(y, patch_size), divmod(x, patch_size)
        assert n_h_w_p_q_c[i, j, p, q, c] == latent[c, y, x]
    assert torch.equal(unpatchify(tokens, (h, w), patch_size), latent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_pack_is_unpack(device, dtype):
    grids = [(4, 4), (3, 5)]
    latents = [LAYOUTS["channels_last"](x) for x in random_latents(8, 2, grids, device=device, dtype=dtype)]
    leaves = [x.requires_grad_() for x in latents]
    tokens = pack(leaves, 2)
    grad = torch.randn(tokens.shape[::-1], device=device).to(dtype).t()  # in another memory order
    assert same(torch.autograd.grad(tokens, leaves, grad), unpack_reference(grad, grids, 2))
    # of one latent alone, and of a sum, whose gradient is one number in memory
    (first,) = torch.autograd.grad(pack([leaves[0], leaves[1].detach()], 2).sum(), leaves[:1])
    assert torch.equal(first, torch.ones_like(first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_unpack_is_pack(device, dtype):
    grids = [(4, 4), (3, 5), (2, 2)]
    tokens = torch.randn(35, 32, device=device).to(dtype).requires_grad_()
    latents = unpack(tokens, grids, 2)
    grads = [torch.randn_like(x).transpose(1, 2).contiguous().transpose(1, 2) for x in latents]
    (all_used,) = torch.autograd.grad(latents, tokens, grads, retain_graph=True)
    assert torch.equal(all_used, pack_reference(grads, 2))
    (one_used,) = torch.autograd.grad(latents[1], tokens, grads[1])
    nothing = [torch.zeros_like(grad) for grad in grads]
    assert torch.equal(one_used, pack_reference([nothing[0], grads[1], nothing[2]], 2))


def test_second_derivatives_are_those_of_the_reference(device):
    latents = random_latents(4, 2, [(2, 2), (1, 3)], device=device)

    def second(pack, unpack):
        leaves = [x.detach().requires_grad_() for x in latents]
        tokens = pack(leaves, 2).pow(3)
        loss = sum(x.pow(2).sum() for x in unpack(tokens, [(2, 2), (1, 3)], 2))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves)

    for ours, truth in zip(second(pack, unpack), second(pack_reference, unpack_reference), strict=True):
        torch.testing.assert_close(ours, truth)


def test_reference_passes_gradcheck():
    grids = [(2, 1), (1, 3)]
    latents = [x.double().requires_grad_() for x in random_latents(3, 2, grids)]
    assert torch.autograd.gradcheck(lambda *x: pack_reference(x, 2), latents)
    tokens = pack_reference(latents, 2).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(unpack_reference(x, grids, 2)), tokens)


def test_does_not_read_uninitialized_memory(device):
    """Allocations are filled with NaN, which exposes outputs that are not written."""
    grids = [(3, 5), (4, 4)]
    latents = random_latents(17, 2, grids, device=device)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert same(unpack(pack(latents, 2), grids, 2), latents)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", BACKENDS[:1], indirect=True, ids=["cpp"])
@pytest.mark.usefixtures("device")
def test_any_number_of_threads_moves_every_row():
    latents = random_latents(16, 2, [(32, 32), (16, 16), (7, 9)] * 2)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(pack(latents, 2), pack_reference(latents, 2))
    finally:
        torch.set_num_threads(before)


def test_operators_are_registered_as_torch_expects(device, operators):
    grids = [(2, 2), (1, 3)]
    latents = [x.requires_grad_() for x in random_latents(4, 2, grids, device=device)]
    tokens = pack_reference(latents, 2).detach().requires_grad_()
    packed, unpacked = operators
    torch.library.opcheck(packed, (latents, 2))
    torch.library.opcheck(unpacked, (tokens, list(chain.from_iterable(grids)), 2))


def test_compiles_without_a_graph_break(device):
    grids = [(2, 2), (1, 3)]
    latents = [x.requires_grad_() for x in random_latents(4, 2, grids, device=device)]

    def both(latents):
        return unpack(pack(latents, 2) * 2, grids, 2)

    got = torch.compile(both, backend="aot_eager", fullgraph=True)(latents)
    assert same(got, [x * 2 for x in latents])
    assert same(torch.autograd.grad(got, latents, list(latents)), [x * 2 for x in latents])


def test_autocast_changes_nothing(device):
    latents = random_latents(4, 2, [(2, 2)], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        tokens = pack(latents, 2)
        assert torch.equal(tokens, pack_reference(latents, 2))
        assert same(unpack(tokens, [(2, 2)], 2), latents)


def test_tensors_that_no_other_backend_accepts_run_on_the_reference(monkeypatch):
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    latents = [x.double() for x in random_latents(4, 2, [(2, 2), (1, 3)])]
    tokens = pack(latents, 2)
    assert torch.equal(tokens, pack_reference(latents, 2))
    assert same(unpack(tokens, [(2, 2), (1, 3)], 2), latents)


@pytest.mark.parametrize(
    ("latents", "patch_size", "message"),
    [
        ([], 2, "nothing to pack"),
        ([torch.zeros(4, 4)], 2, r"latent 0: expected \(c, h, w\)"),
        ([torch.zeros(4, 4, 5)], 2, r"divisible by patch_size 2, got \(4, 4, 5\)"),
        ([torch.zeros(4, 4, 4)], 0, "patch_size: expected at least 1, got 0"),
        ([torch.zeros(4, 4, 4), torch.zeros(8, 4, 4)], 2, "latent 1: .* differs in channels"),
        ([torch.zeros(4, 4, 4), torch.zeros(4, 4, 4).double()], 2, "latent 1: .* differs in channels, dtype"),
        ([torch.zeros(4, 4, 4), torch.zeros(4, 4, 4, device="meta")], 2, "latent 1: .* on meta differs"),
    ],
)
def test_latents_that_cannot_be_packed_are_refused(latents, patch_size, message):
    with pytest.raises(UserError, match=message):
        pack(latents, patch_size)


@pytest.mark.parametrize(
    ("tokens", "grids", "patch_size", "message"),
    [
        (torch.zeros(4, 16), [(2, 2)], 3, "16 features, not a multiple of patch_size"),
        (torch.zeros(4, 16), [(2, 2)], -1, "patch_size: expected at least 1"),
        (torch.zeros(1, 4, 16), [(2, 2)], 2, r"tokens: expected \(T, p\*p\*c\), got \(1, 4, 16\)"),
        (torch.zeros(4, 16), [(2, 1), (1, 1)], 2, "grids: expected sizes .* with 4 tokens in total"),
        (torch.zeros(4, 16), [(-2, -2)], 2, "grids: expected sizes"),
        (torch.zeros(0, 16), [], 2, "grids: expected sizes"),
    ],
)
def test_tokens_that_cannot_be_unpacked_are_refused(tokens, grids, patch_size, message):
    with pytest.raises(UserError, match=message):
        unpack(tokens, grids, patch_size)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pack", ([], 2)),
        ("pack", ([torch.zeros(4, 4)], 2)),
        ("pack", ([torch.zeros(4, 4, 5)], 2)),
        ("pack", ([torch.zeros(1, 4, 4)], 0)),
        ("pack", ([torch.zeros(1, 4, 4), torch.zeros(2, 4, 4)], 2)),
        ("unpack", (torch.zeros(4, 16), [2, 2], 3)),
        ("unpack", (torch.zeros(4, 16), [2, 3], 2)),
        ("unpack", (torch.zeros(4, 16), [2, 2, 2], 2)),
        ("unpack", (torch.zeros(4, 16), [-2, -2], 2)),
    ],
)
@pytest.mark.parametrize("device", BACKENDS[:1], indirect=True, ids=["cpp"])
@pytest.mark.usefixtures("device")
def test_the_compiled_operators_refuse_invalid_arguments(name, arguments):
    with pytest.raises(RuntimeError, match=name):
        getattr(torch.ops.cat_fast, name)(*arguments)
