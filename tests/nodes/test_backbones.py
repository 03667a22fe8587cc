"""Each layer of the baselines against its equation, and the interface that they share with UrbanPG."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdist.nodes.backbones.graph_wavenet import DiffusionConvolution, GraphWaveNetSpec
from stdist.nodes.backbones.layers import TemporalConvolution
from stdist.nodes.backbones.stgcn import ChebyshevConvolution, STGCNSpec
from stdist.nodes.backbones.stid import STIDSpec
from stdist.nodes.forecaster import NodeForecaster, build
from stdist.nodes.graphs import scaled_laplacian, sparse_graph, transition

N, MEAN, STD = 7, 100.0, 40.0
SPECS = {
    "stid": STIDSpec(history=12, horizon=4, cadence=60, nodes=N, d=4),
    "graph_wavenet": GraphWaveNetSpec(
        history=12, horizon=4, cadence=60, nodes=N, residual_channels=4, dilation_channels=3, skip_channels=6
    ),
    "stgcn": STGCNSpec(history=12, horizon=4, cadence=60, nodes=N, channels=5, graph_channels=3),
}
KINDS = pytest.mark.parametrize("kind", SPECS)


def ring(nodes: int = N) -> Tensor:
    """Directed: each node to the two behind it and to itself, all weights different; the last node has no edges."""
    weights = torch.zeros(nodes, nodes)
    for step in range(3):
        n = torch.arange(nodes - 1)
        weights[n, (n + step) % (nodes - 1)] = 0.2 + (n + 1) / nodes + step
    return weights


def make(kind: str, graph: Tensor | None = None, **change) -> NodeForecaster:
    torch.manual_seed(1)
    made = build(SPECS[kind].model_copy(update=change), MEAN, STD, ring() if graph is None else graph)
    for name, buffer in made.named_buffers():  # batch normalisation as after training
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return made.eval()


def batch(nodes: int = N, frames: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    history = MEAN + STD * torch.randn(2, frames, nodes, generator=torch.Generator().manual_seed(7))
    return history, torch.tensor([3, 20]), torch.tensor([0, 6])


# --- graphs ------------------------------------------------------------------------------------------------------


def test_transition_leaves_each_node_with_weights_of_one():
    W = ring()
    P = transition(sparse_graph(W)).to_dense()
    torch.testing.assert_close(P[:-1], W[:-1] / W[:-1].sum(1, keepdim=True))
    assert (P[-1] == 0).all()


def laplacian_of(W: Tensor) -> Tensor:
    W = torch.maximum(W, W.T)
    W.fill_diagonal_(0)
    D = torch.where(W.sum(1) > 0, W.sum(1).rsqrt(), 0)
    L = torch.eye(len(W)) - D[:, None] * W * D
    return L * 2 / 2 - torch.eye(len(W))


def test_scaled_laplacian_of_the_symmetric_graph():
    found = scaled_laplacian(sparse_graph(ring())).to_dense()
    torch.testing.assert_close(found, laplacian_of(ring()))
    eigenvalues = torch.linalg.eigvalsh(found)
    assert eigenvalues.min() >= -1 - 1e-6 and eigenvalues.max() <= 1 + 1e-6


def test_a_sparse_graph_is_the_dense_one_and_numpy_too():
    expected = make("stgcn")(*batch())
    for given in (ring().to_sparse_coo(), ring().numpy()):
        assert torch.equal(make("stgcn", graph=given)(*batch()), expected)


# --- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (2, 4), (3, 1), (3, 2)])
def test_equation_8_of_graph_wavenet_a_dilated_convolution_of_the_past(kernel, dilation):
    layer, x = TemporalConvolution(4, 5, kernel, dilation), torch.randn(3, 2, 12, 4)
    weight = layer.linear.weight.view(5, kernel, 4).transpose(1, 2)
    expected = F.conv1d(x.flatten(0, 1).transpose(1, 2), weight, layer.linear.bias, dilation=dilation)
    torch.testing.assert_close(layer(x).flatten(0, 1).transpose(1, 2), expected)
    changed = x.clone()
    changed[:, :, 8] += 1
    difference = (layer(changed) - layer(x)).abs().amax((0, 1, 3)) > 0
    reach = (kernel - 1) * dilation
    assert [frame + reach for frame in difference.nonzero()[:, 0].tolist()] == [
        frame for frame in range(8, 12) if (frame - 8) % dilation == 0 and frame - 8 <= reach
    ], "a frame reaches itself and later ones only"


def test_equation_6_of_graph_wavenet():
    supports = [torch.rand(N, N), torch.rand(N, N).to_sparse_coo()]
    layer, x = DiffusionConvolution(4, 5, len(supports), 2), torch.randn(N, 2, 3, 4)
    W = layer.linear.weight.view(5, 5, 4)
    expected = torch.einsum("nbtc,dc->nbtd", x, W[:, 0]) + layer.linear.bias
    for s, support in enumerate(supports):
        for k in (1, 2):
            P_k = torch.linalg.matrix_power(support.to_dense(), k)
            expected = expected + torch.einsum("nm,mbtc,dc->nbtd", P_k, x, W[:, 2 * s + k])
    torch.testing.assert_close(layer(x, supports), expected)


@pytest.mark.parametrize("terms", [1, 2, 3, 5])
def test_equation_3_of_stgcn_through_the_eigenvalues(terms):
    laplacian = laplacian_of(ring())
    values, U = torch.linalg.eigh(laplacian.double())
    layer, x = ChebyshevConvolution(4, 5, terms).double(), torch.randn(N, 2, 3, 4).double()
    theta = layer.linear.weight.view(5, terms, 4)
    expected = layer.linear.bias
    for k in range(terms):
        T_k = U @ torch.diag(torch.cos(k * torch.arccos(values.clamp(-1, 1)))) @ U.T
        expected = expected + torch.einsum("nm,mbtc,dc->nbtd", T_k, x, theta[:, k])
    torch.testing.assert_close(layer(x, laplacian.double().to_sparse_coo()), expected, rtol=1e-5, atol=1e-5)


# --- whole models ------------------------------------------------------------------------------------------------


def restored(scores: Tensor) -> Tensor:
    return (scores * STD + MEAN).transpose(1, 2)


@pytest.mark.parametrize("nodes", [N, None])
def test_stid_is_equations_1_to_3(nodes):
    model, (history, slot, weekday) = make("stid", nodes=nodes), batch()
    stid, scores = model.backbone, (history - MEAN) / STD
    made = torch.empty(2, N, 4)
    for sample in range(2):
        for node in range(N):
            Z = [stid.series(scores[sample, :, node])]
            Z += [] if nodes is None else [stid.node_rows[node]]
            Z = torch.cat([*Z, stid.time_of_day_rows[slot[sample]], stid.day_of_week_rows[weekday[sample]]])
            for layer in stid.encoder:
                Z = layer.layers[3](layer.layers[0](Z).relu()) + Z
            made[sample, node] = stid.regression(Z)
    torch.testing.assert_close(model(history, slot, weekday), restored(made))


def test_stid_has_the_parameters_of_the_authors_sizes():
    model = build(STIDSpec(history=12, horizon=12, cadence=5, nodes=716), 0.0, 1.0)
    embeddings = (716 + 288 + 7) * 32
    encoder = 3 * 2 * (128 * 128 + 128)
    assert sum(p.numel() for p in model.parameters()) == embeddings + (12 * 32 + 32) + encoder + (128 * 12 + 12)


def as_conv2d(linear) -> tuple[Tensor, Tensor]:
    return linear.weight[:, :, None, None], linear.bias


@pytest.mark.parametrize("nodes", [N, None])
@pytest.mark.parametrize("frames", [5, 12, 16])
def test_graph_wavenet_is_the_authors_network(nodes, frames):
    """As their code has it: [B, C, N, T], dense supports, skip connections of all frames."""
    model, (history, slot, weekday) = make("graph_wavenet", nodes=nodes, history=frames), batch(frames=frames)
    ours, W = model.backbone, ring()
    ago = torch.arange(frames - 1, -1, -1)
    of_day = ((slot[:, None] - ago) % 24 / 24)[:, None, None].expand(-1, 1, N, -1)
    x = torch.cat([((history - MEAN) / STD).transpose(1, 2)[:, None], of_day], 1)
    supports = [torch.nan_to_num(w / w.sum(1, keepdim=True)) for w in (W, W.T)]
    if nodes:
        supports.append(torch.softmax(F.relu(ours.source @ ours.target.T), 1))
    x = F.conv2d(F.pad(x, (max(13 - frames, 0), 0)), *as_conv2d(ours.start))
    skip = 0
    for layer, dilation in zip(ours.layers, [1, 2] * 4, strict=True):
        joint = layer.gated.convolution.linear
        weight = joint.weight.view(6, 2, 4).transpose(1, 2)[:, :, None]
        filtered, gate = F.conv2d(x, weight, joint.bias, dilation=(1, dilation)).chunk(2, 1)
        h = torch.tanh(filtered) * torch.sigmoid(gate)
        s = F.conv2d(h, *as_conv2d(layer.skip))
        skip = s + (skip[..., -s.shape[3] :] if torch.is_tensor(skip) else 0)
        if layer.diffusion is None:
            break
        terms = [h]
        for A in supports:
            terms.append(torch.einsum("nm,bcmt->bcnt", A, h))
            terms.append(torch.einsum("nm,bcmt->bcnt", A, terms[-1]))
        h = F.conv2d(torch.cat(terms, 1), *as_conv2d(layer.diffusion.linear))
        norm, x = layer.norm, h + x[..., -h.shape[3] :]
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    hidden = F.conv2d(F.relu(skip), *as_conv2d(ours.end[1])).relu()
    made = F.conv2d(hidden, *as_conv2d(ours.end[3]))[..., -1]
    torch.testing.assert_close(model(history, slot, weekday), restored(made.transpose(1, 2)), rtol=1e-4, atol=1e-3)


def test_graph_wavenet_sees_thirteen_frames():
    assert SPECS["graph_wavenet"].receptive_field == 13
    for frames, unseen in ((12, 0), (15, 2)):
        model, (history, *when) = make("graph_wavenet", history=frames), batch(frames=frames)
        model(history.requires_grad_(), *when).sum().backward()
        assert (history.grad.abs().amax((0, 2)) > 0).tolist() == [False] * unseen + [True] * (frames - unseen)


def test_graph_wavenet_learns_a_graph_where_none_is_given():
    model = build(SPECS["graph_wavenet"], MEAN, STD)
    model(*batch()).sum().backward()
    assert model.backbone.source.grad.abs().sum() > 0


@pytest.mark.parametrize("nodes", [N, None])
def test_stgcn_is_equations_7_and_8(nodes):
    model, (history, slot, weekday) = make("stgcn", nodes=nodes), batch()
    ours, L = model.backbone, laplacian_of(ring())
    chebyshev = [torch.eye(N), L, 2 * L @ L - torch.eye(N)]

    def gated(layer, v: Tensor, kernel: int) -> Tensor:  # v: [B, T, N, C]
        v_in = v[:, kernel - 1 :]
        frames = v_in.shape[1]
        P, Q = layer.convolution.linear(torch.cat([v[:, i : i + frames] for i in range(kernel)], -1)).chunk(2, -1)
        v_in = F.pad(v_in, (0, P.shape[-1] - v_in.shape[-1]))
        return (P + v_in) * torch.sigmoid(Q)

    v = ((history - MEAN) / STD)[..., None]
    for block in ours.blocks:
        with torch.no_grad():  # as after training
            block.scale.uniform_(0.5, 1.5), block.shift.uniform_(-1, 1)
        v = gated(block.first, v, 3)
        v = torch.cat([torch.einsum("nm,btmc->btnc", T, v) for T in chebyshev], -1) @ block.graph.linear.weight.T
        v = gated(block.second, (v + block.graph.linear.bias).relu(), 3)
        flat = F.layer_norm(v.flatten(2), [v[0, 0].numel()], eps=1e-6)
        v = flat.view(v.shape) * block.scale[:, 0, 0] + block.shift[:, 0, 0]
    made = ours.output(gated(ours.last, v, 4)[:, 0])
    torch.testing.assert_close(model(history, slot, weekday), restored(made), rtol=1e-4, atol=1e-3)


# --- the interface -----------------------------------------------------------------------------------------------


@KINDS
def test_shapes_gradients_and_missing_values(kind):
    model, (history, slot, weekday) = make(kind).train(), batch()
    history[0, 3, 2] = torch.nan
    made = model(history, slot, weekday)
    assert made.shape == (2, 4, N) and made.isfinite().all()
    made.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    filled = history.nan_to_num(MEAN)
    assert torch.equal(model(history, slot, weekday), model(filled, slot, weekday)), "missing is the mean"


@KINDS
def test_one_backbone_serves_cities_of_any_size(kind):
    backbone = make(kind, nodes=None).backbone
    graphs = {n: None if kind == "stid" else sparse_graph(ring(n)) for n in (N, 12)}
    cities = {n: NodeForecaster(backbone, MEAN, STD, graph) for n, graph in graphs.items()}
    assert {n: city(*batch(n)).shape[2] for n, city in cities.items()} == {N: N, 12: 12}
    assert cities[N].backbone is cities[12].backbone


@KINDS
@pytest.mark.parametrize("nodes", [N, None])
def test_save_and_load_are_bitwise(kind, nodes, tmp_path):
    saved = make(kind, nodes=nodes)
    saved.save_pretrained(tmp_path)
    loaded = NodeForecaster.from_pretrained(tmp_path)
    assert loaded.spec == saved.spec and type(loaded.backbone) is type(saved.backbone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(loaded(*batch()), saved(*batch()))
    assert {n: t.numpy().tobytes() for n, t in loaded.state_dict().items()} == {
        n: t.numpy().tobytes() for n, t in saved.state_dict().items()
    }
    loaded.train()(*batch()).sum().backward()  # what is loaded trains


class Largest(TorchDispatchMode):
    """The largest dense tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["graph_wavenet", "stgcn"])
def test_a_given_graph_is_never_dense(kind):
    nodes = 3_000
    model = make(kind, nodes=None, graph=ring(nodes).to_sparse_coo())
    with Largest() as largest:
        model(*batch(nodes)).sum().backward()
    assert largest.numel < nodes * nodes


@KINDS
def test_input_that_does_not_fit(kind, refused):
    model, (history, slot, weekday) = make(kind), batch()
    refused(lambda: model(*batch(9)), "9 nodes", kind, f"have {N}", "train others")
    refused(lambda: model(history[:, :5], slot, weekday), "[2, 5, 7]", "[B, 12, N]")
    refused(lambda: model(history, slot + 4, weekday), "slot 24", "24 slots of 60 min", kind)
    refused(lambda: model(history, slot, weekday + 1), "weekday 7")
    refused(lambda: model.calendar(np.array(["2019-01-06T23:30"], "datetime64[m]")), "23:30", kind, "60 min")
    history[1, :, 4] = torch.nan
    refused(lambda: model(history, slot, weekday), "node 4", "sample 1", "impute")
    assert model.calendar(np.array(["2019-01-06T23:00"], "datetime64[m]")) == (torch.tensor([23]), torch.tensor([6]))


def test_specs_and_graphs_that_do_not_fit(tmp_path, refused):
    spec = SPECS["graph_wavenet"]
    refused(lambda: build(SPECS["stgcn"], MEAN, STD), "stgcn needs a graph")
    refused(lambda: build(spec.model_copy(update={"nodes": None}), MEAN, STD), "neither a graph nor nodes")
    refused(lambda: build(spec, MEAN, STD, ring(9)), "9 nodes", "of 7")
    refused(lambda: build(spec, MEAN, STD, ring()[:5]), "[5, 7]", "[N, N]")
    for wrong in (-1.0, torch.inf, torch.nan):
        refused(lambda wrong=wrong: build(spec, MEAN, STD, torch.full((N, N), wrong)), "negative or not finite")
    refused(lambda: make("stgcn", history=8), "9 frames or more")
    refused(lambda: make("stid", horizon=0), "size below 1")
    refused(lambda: make("stid", cadence=7), "7 min does not divide a day")
    refused(lambda: build(SPECS["stid"], MEAN, 0.0), "std 0.0")
    without = build(spec, MEAN, STD).backbone
    refused(lambda: NodeForecaster(without, MEAN, STD, sparse_graph(ring())), "used with", "made without")
    refused(lambda: NodeForecaster(make("stgcn").backbone, MEAN, STD), "used without", "made with")
    make("stid").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "urbanpg_backbone"}))
    refused(lambda: NodeForecaster.from_pretrained(tmp_path), "config.json", "urbanpg_backbone")
