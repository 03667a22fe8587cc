"""Values per second, encoded and decoded: the arithmetic codec against look-ups through a tokenizer.

The peer is what a tokenizer with the numerals as added tokens offers: each value is written as a token string
and looked up with ``token_to_id``; back, ``id_to_token`` and parsing. Both sides run in turn, on one core, in
one process, on the same values, log-uniform over the numerals' range with both signs, and must agree.

    python benchmarks/codec.py --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, models

from stdist.numerals import Vocabulary

VALUES, PEER_VALUES = 1_000_000, 50_000
_TOKEN = re.compile(r"<\|FP(-?)(\d)(\d*)/(-?\d)\|>")

Floats = npt.NDArray[np.floating]


def peer_round_trip(tokenizer: Tokenizer, values: Floats) -> list[float]:
    """Encode and decode value by value through the tokenizer."""
    ids = []
    for value in values.tolist():
        figures, exponent = f"{value:.3e}".split("e")
        mantissa = figures.replace(".", "").rstrip("0")
        least = 3 if mantissa.startswith("-") else 2
        index = tokenizer.token_to_id(f"<|FP{mantissa.ljust(least, '0')}/{int(exponent)}|>")
        assert index is not None
        ids.append(index)
    decoded = []
    for index in ids:
        match = _TOKEN.fullmatch(tokenizer.id_to_token(index) or "")
        assert match is not None
        sign, first, rest, exponent = match.groups()
        decoded.append(float(f"{sign}{first}.{rest}e{exponent}"))
    return decoded


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(runs: int, dtype: str) -> dict[str, Any]:
    vocabulary = Vocabulary()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.tokens()])

    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], VALUES) * 10 ** rng.uniform(-4, 5.99, VALUES)).astype(dtype)
    part = values[:PEER_VALUES]
    if peer_round_trip(tokenizer, part) != vocabulary.decode(vocabulary.encode(part)).tolist():
        raise SystemExit("error: codec and tokenizer look-up disagree")

    ours, peer = [], []
    vocabulary.decode(vocabulary.encode(values))
    for _ in range(runs):
        ours.append(VALUES / seconds(lambda: vocabulary.decode(vocabulary.encode(values))))
        peer.append(PEER_VALUES / seconds(lambda: peer_round_trip(tokenizer, part)))
    value, peer_value = statistics.median(ours), statistics.median(peer)
    return {
        "name": "codec",
        "value": round(value),
        "unit": "values encoded and decoded per second, one core",
        "peer": "tokenizers token_to_id and id_to_token, one value at a time",
        "peer_value": round(peer_value),
        "ratio": round(value / peer_value, 1),
        "runs": runs,
        "spread": {
            "value": [round(min(ours)), round(max(ours))],
            "peer_value": [round(min(peer)), round(max(peer))],
        },
        "setting": (
            f"{VALUES} {dtype} values a run ({PEER_VALUES} for the peer), {len(vocabulary)} numerals, "
            f"numpy {np.__version__}, Python {platform.python_version()}, "
            f"one of {os.cpu_count()} cores of {processor()}"
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    arguments = parser.parse_args()
    result = measure(arguments.runs, arguments.dtype)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['value'] / 1e6:.1f} million values/s, {result['ratio']} times {result['peer']}")


if __name__ == "__main__":
    main()
