"""Weights of a policy on their way to a worker: what trains, named by the SHA-256 of its content, and verified there.

Two checks on arrival: every tensor's digest says that all bits came, and a probe, log-probabilities of a fixed window
under the new weights, that the frozen rest of the policy, its code and its arithmetic are the learner's too.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, UInt8

from stdist.runs.workers import Version, VersionError
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.city_windows import encode_windows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.rollouts import Weights

PROBED = 64
"""Numerals whose log-probabilities are compared."""
PART_BYTES = 2**26
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Of a log-probability, by the dtype that computes it: kernels differ between devices, weights must not."""


def pack(policy: PolicyModel, step: int) -> Version:
    """Copies what trains, as it is after ``step`` updates, with its digests and the policy's probe."""
    weights = {name: x.to("cpu", copy=True).contiguous() for name, x in Weights.of(policy).tensors.items()}
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
    named = {name: [str(x.dtype), list(x.shape)] for name, x in own.items()}
    if named != {name: [dtype, shape] for name, (dtype, shape, _) in entries.items()}:
        raise VersionError(f"weights {version.name[:12]} are not of what trains here: {_difference(named, entries)}")
    wrong = [name for name, digest in _digests(version.tensors).items() if digest != entries[name][2]]
    if wrong or version.tensors.keys() != entries.keys():
        raise VersionError(f"weights {version.name[:12]} arrived with another content in {(wrong or ['?'])[0]}")
    for name, target in own.items():
        # Ray's memory is read-only; torch would warn that it cannot know.
        source = torch.from_numpy(np.require(version.tensors[name], requirements=["W"]))
        target.copy_(source.view(target.dtype).view(target.shape))
    sent, here = np.array(manifest["probe"]), probe(policy)
    distance = float(np.abs(sent - here).max())
    if not distance <= TOLERANCE[policy.rows.input.dtype if policy.spec.dtype == "float32" else torch.bfloat16]:
        raise VersionError(
            f"with weights {version.name[:12]} this policy's log-probabilities are up to {distance:.3g} from the "
            "learner's: its frozen weights, its code or its arithmetic are other ones"
        )


@torch.no_grad()
def probe(policy: PolicyModel) -> Float[np.ndarray, "numerals"]:
    """Log-probabilities of evenly spaced numerals behind one cell of a made-up window."""
    spec, count = policy.spec, len(policy.vocabulary)
    height, width = (spec.frames.height, spec.frames.width) if spec.frames else (1, 1)
    scale = spec.frames.t_max if spec.frames else 1.0
    ramp = np.linspace(0, scale, height * width, dtype=np.float32).reshape(1, 1, height, width)
    history = policy.vocabulary.clamp(np.repeat(ramp, spec.setting.history, axis=1))[0].astype(np.float32)
    cell = np.array([[height // 2, width // 2]])
    origin = np.datetime64("2013-11-04T08:00")
    shared, grids, prompts = encode_windows(policy, history, [origin], cell, cell + spec.setting.first_cell)
    hidden, _ = policy.branch(policy.prefix(shared, grids), prompts)
    log_p = head_logits(hidden[:, -1], policy.answer_head[:1]).log_softmax(-1)[0]
    return log_p[torch.linspace(0, count - 1, PROBED).long()].double().cpu().numpy()


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
