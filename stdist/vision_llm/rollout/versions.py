"""Weights of a policy on their way to a worker: what changed, named by the SHA-256 of its content, and verified there.

A version is the adapter and the numerals' rows: those of the head, of which every step changes all, and of the
embedding the ones that differ from the reference's, which learner and worker both begin with: the numerals that the
stage has met. Rows travel in the dtype that computes, to which both sides round them before every product.

Two checks on arrival: every tensor's digest says that all bits came, and a probe, log-probabilities of a fixed window
under the new weights, that the frozen rest of the policy, its code and its arithmetic are the learner's too.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from stdist.runs.workers import Version, VersionError
from stdist.training.inference import inference
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.city_windows import encode_windows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings
from stdist.vision_llm.rollout.rollouts import Weights

EMBEDDING, HEAD = "rows.input", "rows.output"
CHANGED = "rows.input.changed"
"""Name of a version's indices of the rows of the embedding that it holds."""
ROWS_AT_ONCE = 8192
PROBED = 64
"""Numerals whose log-probabilities are compared."""
PART_BYTES = 2**26
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Differences of a log-probability that pass, by the dtype that computes it: kernels differ, weights must not."""


def pack(policy: PolicyModel, step: int) -> Version:
    """Copies what changed, as it is after ``step`` updates of GRPO, with its digests and the policy's probe."""
    trained, dtypes = Weights.of(policy).tensors, _sent_dtypes(policy)
    changed = _changed_rows(policy)
    rows = trained[EMBEDDING].index_select(0, changed)
    weights = {name: _copied(x, dtypes[name]) for name, x in {**trained, EMBEDDING: rows}.items()}
    weights[CHANGED] = changed.to("cpu")
    tensors = {name: x.view(-1).view(torch.uint8).numpy() for name, x in weights.items()}
    digests = _digests(tensors)
    entries = {name: [str(x.dtype), list(x.shape), digests[name]] for name, x in sorted(weights.items())}
    name = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    manifest = json.dumps({"tensors": entries, "probe": probe(policy).tolist()})
    return Version(step, name, manifest.encode(), tensors)


@torch.no_grad()
def unpack(policy: PolicyModel, version: Version) -> None:
    """Gives a policy the version's weights. Raises VersionError where its tensors are not those of the digests, or not
    those that the policy trains, or where the policy computes another probe with them."""
    manifest = json.loads(version.manifest)
    entries, own = manifest["tensors"], Weights.of(policy).tensors
    dtypes, shapes = _sent_dtypes(policy), {name: list(x.shape) for name, x in own.items()}
    rows = entries.get(CHANGED, [None, [0]])[1]
    shapes |= {CHANGED: rows, EMBEDDING: [*rows, *shapes[EMBEDDING][1:]]}
    named = {name: [str(dtype), shapes[name]] for name, dtype in dtypes.items()}
    if named != {name: [dtype, shape] for name, (dtype, shape, _) in entries.items()}:
        raise VersionError(f"weights {version.name[:12]} are not of what trains here: {_difference(named, entries)}")
    wrong = [name for name, digest in _digests(version.tensors).items() if digest != entries[name][2]]
    if wrong or version.tensors.keys() != entries.keys():
        raise VersionError(f"weights {version.name[:12]} arrived with another content in {(wrong or ['?'])[0]}")
    sent = {name: _tensor(x, dtypes[name], shapes[name]) for name, x in version.tensors.items()}
    for name, target in own.items():
        if name == EMBEDDING:
            target.copy_(_reference(policy).input)
            target[sent[CHANGED].to(target.device)] = sent[name].to(target)
        else:
            target.copy_(sent[name])
    distance = float(np.abs(np.array(manifest["probe"]) - probe(policy)).max())
    if not distance <= TOLERANCE[policy.text_head.dtype]:
        raise VersionError(
            f"with weights {version.name[:12]} this policy's log-probabilities are up to {distance:.3g} from the "
            "learner's: its frozen weights, its code or its arithmetic are other ones"
        )


def probe(policy: PolicyModel) -> Float[np.ndarray, " numerals"]:
    """Log-probabilities of evenly spaced numerals behind one cell of a made-up window."""
    spec, count = policy.spec, len(policy.vocabulary)
    height, width = (spec.frames.height, spec.frames.width) if spec.frames else (1, 1)
    scale = spec.frames.t_max if spec.frames else 1.0
    ramp = np.linspace(0, scale, height * width, dtype=np.float32).reshape(1, 1, height, width)
    history = policy.vocabulary.clamp(np.repeat(ramp, spec.setting.history, axis=1))[0].astype(np.float32)
    cell = np.array([[height // 2, width // 2]])
    origin = np.datetime64("2013-11-04T08:00")
    shared, grids, prompts = encode_windows(policy, history, [origin], cell, cell + spec.setting.first_cell)
    with inference(policy):
        hidden, _ = policy.branch(policy.prefix(shared, grids), prompts)
        log_p = head_logits(hidden[:, -1], policy.answer_head[:1]).log_softmax(-1)[0]
    return log_p[torch.linspace(0, count - 1, PROBED).long()].double().cpu().numpy()


def sent_bytes(policy: PolicyModel) -> dict[str, int]:
    """Bytes of a version's tensors by name, without the rows of the embedding: how many of them change, no shape
    says."""
    dtypes, trained = _sent_dtypes(policy), Weights.of(policy).tensors
    return {name: x.numel() * dtypes[name].itemsize for name, x in trained.items() if name != EMBEDDING}


def _sent_dtypes(policy: PolicyModel) -> dict[str, torch.dtype]:
    """Dtypes of a version's tensors by name."""
    trained = {name: x.dtype for name, x in Weights.of(policy).tensors.items()}
    return trained | dict.fromkeys((EMBEDDING, HEAD), policy.text_head.dtype) | {CHANGED: torch.int64}


def _changed_rows(policy: PolicyModel) -> Int[Tensor, " rows"]:
    now, before = (rows.input.detach().split(ROWS_AT_ONCE) for rows in (policy.rows, _reference(policy)))
    differ = [(a.to(b.dtype) != b).any(1) for a, b in zip(now, before, strict=True)]
    return torch.cat(differ).nonzero().flatten()


def _reference(policy: PolicyModel) -> NumeralEmbeddings:
    assert policy.reference_rows is not None, "call begin_grpo first"
    return policy.reference_rows


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, part by part: a GPU has no room for another copy of the rows in another dtype."""
    copy = torch.empty(tensor.shape, dtype=dtype)
    for target, source in zip(copy.split(ROWS_AT_ONCE), tensor.split(ROWS_AT_ONCE), strict=True):
        target.copy_(source)
    return copy


def _tensor(content: UInt8[np.ndarray, "bytes"], dtype: torch.dtype, shape: list[int]) -> Tensor:
    if content.size == 0:  # has no stride to be viewed by
        return torch.empty(shape, dtype=dtype)
    # Ray's memory is read-only; torch would warn that it cannot know.
    return torch.from_numpy(np.require(content, requirements=["W"])).view(dtype).view(shape)


def _digests(tensors: Mapping[str, UInt8[np.ndarray, "bytes"]]) -> dict[str, str]:
    """SHA-256 over the SHA-256 of each tensor's parts, which all cores hash at once: hashing lets other threads run."""
    parts = [
        (name, x[first : first + PART_BYTES]) for name, x in tensors.items() for first in range(0, x.size, PART_BYTES)
    ]
    whole = {name: hashlib.sha256() for name in tensors}
    with ThreadPoolExecutor() as threads:
        for (name, _), digest in zip(
            parts, threads.map(lambda part: hashlib.sha256(part[1]).digest(), parts), strict=True
        ):
            whole[name].update(digest)
    return {name: digest.hexdigest() for name, digest in whole.items()}


def _difference(own: Mapping[str, object], sent: Mapping[str, object]) -> str:
    missing, foreign = sorted(own.keys() - sent.keys()), sorted(sent.keys() - own.keys())
    return f"without {missing[0]}" if missing else f"with {foreign[0]}" if foreign else "other shapes or dtypes"
