"""Values per second, encoded and decoded: the arithmetic codec against look-ups through a tokenizer.

The peer is what a tokenizer with the numerals as added tokens offers: each value is written as a token string
and looked up with ``token_to_id``; back, ``id_to_token`` and parsing. Both sides run in turn, on one core, in
one process, on the same values, log-uniform over the numerals' range with both signs, and must agree.

    python benchmarks/codec.py --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import re
from typing import Any

import numpy as np
import numpy.typing as npt
from _harness import comparison, in_turn, parser, publish
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


def measure(runs: int, dtype: str) -> dict[str, Any]:
    vocabulary = Vocabulary()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.tokens()])

    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], VALUES) * 10 ** rng.uniform(-4, 5.99, VALUES)).astype(dtype)
    part = values[:PEER_VALUES]
    if peer_round_trip(tokenizer, part) != vocabulary.decode(vocabulary.encode(part)).tolist():
        raise SystemExit("error: codec and tokenizer look-up disagree")

    ours, peer = in_turn(
        lambda: vocabulary.decode(vocabulary.encode(values)), lambda: peer_round_trip(tokenizer, part), runs
    )
    return comparison(
        name="codec",
        unit="values encoded and decoded per second",
        values=[VALUES / seconds for seconds in ours],
        peer="tokenizers token_to_id and id_to_token, one value at a time",
        peer_values=[PEER_VALUES / seconds for seconds in peer],
        setting=(
            f"{VALUES} {dtype} values a run ({PEER_VALUES} for the peer), {len(vocabulary)} numerals, "
            f"numpy {np.__version__}"
        ),
        better="more",
    )


def main() -> None:
    arguments = parser(__doc__, runs=15)
    arguments.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    given = arguments.parse_args()
    publish(measure(given.runs, given.dtype), given.json)


if __name__ == "__main__":
    main()
