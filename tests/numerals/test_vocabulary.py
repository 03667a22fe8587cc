"""V_FP: layout, tokens, values, texts (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 6 and 7)."""

import math
import pickle

import numpy as np
import pytest

from stdist.errors import InputError
from stdist.numerals import Vocabulary

SIZES = {4: 199_801, 3: 19_801, 2: 1_801}
CANONICAL = {4: 180_001, 3: 18_001, 2: 1_801}


@pytest.fixture(scope="module", params=[4, 3, 2])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(request.param)


@pytest.fixture(scope="module")
def paper() -> Vocabulary:
    return Vocabulary()


@pytest.fixture(scope="module")
def canonical(vocabulary: Vocabulary) -> np.ndarray:
    """Bool [len], the numerals without a needless zero; the others are aliases of these."""
    mantissa, _ = vocabulary.mantissa_exponent(np.arange(len(vocabulary)))
    return (np.abs(mantissa) < 100) | (mantissa % 10 != 0)


def index_of(vocabulary: Vocabulary, token: str) -> int:
    mantissa, exponent = token.removeprefix("<|FP").removesuffix("|>").split("/")
    return int(vocabulary.indices(int(mantissa), int(exponent)))


def test_sizes(vocabulary: Vocabulary, canonical: np.ndarray) -> None:
    digits = vocabulary.mantissa_digits
    assert len(vocabulary) == len(vocabulary.tokens()) == len(vocabulary.values) == SIZES[digits]
    assert canonical.sum() == CANONICAL[digits]


@pytest.mark.parametrize(
    ("token", "value"),
    [
        ("<|FP114/0|>", 1.14),  # the paper's own examples
        ("<|FP114/2|>", 114.0),
        ("<|FP-821/1|>", -82.1),
        ("<|FP10/0|>", 1.0),
        ("<|FP1140/0|>", 1.14),  # an alias
        ("<|FP0/0|>", 0.0),
        ("<|FP10/-4|>", 1e-4),
        ("<|FP-9999/5|>", -999_900.0),
        ("<|FP10/5|>", 100_000.0),
        ("<|FP1234/-4|>", 1.234e-4),
    ],
)
def test_equations_6_and_7_by_hand(paper: Vocabulary, token: str, value: float) -> None:
    index = index_of(paper, token)
    assert paper.token(index) == token
    assert paper.decode(index) == value


def test_equations_6_and_7_on_every_numeral(vocabulary: Vocabulary) -> None:
    """Norm(m) · 10^b with the logarithm written out; a few units in the last place for its roundings."""
    m, b = vocabulary.mantissa_exponent(np.arange(1, len(vocabulary)))
    norm = m / 10.0 ** np.floor(np.log10(np.abs(m)))
    np.testing.assert_allclose(vocabulary.values[1:], norm * 10.0**b, rtol=1e-15)


def test_values_are_the_nearest_floats_of_the_decimals(vocabulary: Vocabulary) -> None:
    m, b = vocabulary.mantissa_exponent(np.arange(1, len(vocabulary)))
    decimals = [f"{m}e{b - len(str(abs(m))) + 1}" for m, b in zip(m.tolist(), b.tolist(), strict=True)]
    assert vocabulary.values[1:].tolist() == [float(text) for text in decimals]


def test_every_numeral_survives_decode_then_encode(vocabulary: Vocabulary, canonical: np.ndarray) -> None:
    everything = np.arange(len(vocabulary))
    encoded = vocabulary.encode(vocabulary.decode(everything))
    np.testing.assert_array_equal(vocabulary.decode(encoded), vocabulary.values)
    np.testing.assert_array_equal(encoded[canonical], everything[canonical])
    assert canonical[encoded].all()
    assert (encoded[~canonical] != everything[~canonical]).all()


def test_canonical_is_the_first_of_equal_values_by_mantissa(vocabulary: Vocabulary, canonical: np.ndarray) -> None:
    magnitude = np.abs(vocabulary.mantissa_exponent(np.arange(len(vocabulary)))[0])
    order = np.lexsort((magnitude, vocabulary.values))
    ordered = vocabulary.values[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    np.testing.assert_array_equal(np.sort(order[first]), np.flatnonzero(canonical))


def test_layout_is_the_documented_arithmetic(vocabulary: Vocabulary) -> None:
    top = 10**vocabulary.mantissa_digits
    expected = ["<|FP0/0|>"] + [
        f"<|FP{sign * m}/{b}|>" for sign in (1, -1) for b in range(-4, 6) for m in range(10, top)
    ]
    assert vocabulary.tokens() == expected
    sample = range(0, len(vocabulary), 101)
    assert [vocabulary.token(i) for i in sample] == expected[::101]


def test_mantissa_exponent_and_indices_are_inverse(vocabulary: Vocabulary) -> None:
    everything = np.arange(len(vocabulary))
    np.testing.assert_array_equal(vocabulary.indices(*vocabulary.mantissa_exponent(everything)), everything)


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("<|FP114/2|>", "114.000000"),  # the paper's own examples
        ("<|FP-821/1|>", "-82.100000"),
        ("<|FP1140/2|>", "114.000000"),
        ("<|FP0/0|>", "0.000000"),
        ("<|FP10/-4|>", "0.000100"),
        ("<|FP1230/-4|>", "0.000123"),
        ("<|FP1234/-4|>", "0.0001234"),
        ("<|FP-9999/-4|>", "-0.0009999"),
        ("<|FP9999/-3|>", "0.009999"),
        ("<|FP-9999/5|>", "-999900.000000"),
    ],
)
def test_text_by_hand(paper: Vocabulary, token: str, text: str) -> None:
    assert paper.texts([index_of(paper, token)]) == [text]


def test_text_of_every_numeral_parses_back(vocabulary: Vocabulary, canonical: np.ndarray) -> None:
    texts = vocabulary.texts(np.arange(len(vocabulary)))
    assert [float(text) for text in texts] == vocabulary.values.tolist()
    assert {len(text.partition(".")[2]) for text in texts} == ({6, 7} if len(vocabulary) == 199_801 else {6})
    assert len(set(texts)) == canonical.sum()


def test_shapes_and_dtypes(paper: Vocabulary) -> None:
    values = np.array([[1.14, 0.0, -82.1], [114.0, 5.0, 9.9996]])
    for given in (values, values.astype(np.float32), np.asfortranarray(values), values[:, ::-1][:, ::-1]):
        indices = paper.encode(given)
        assert indices.shape == (2, 3) and indices.dtype == np.int64
        np.testing.assert_array_equal(paper.decode(indices), [[1.14, 0, -82.1], [114, 5, 10]])
    assert paper.encode(7).shape == ()
    assert paper.encode([]).shape == paper.decode([]).shape == (0,)
    assert paper.decode(np.array([1], np.int32)).dtype == np.float64
    np.testing.assert_array_equal(paper.encode(values.astype(">f8")), paper.encode(values))


def test_tables_are_read_only_and_the_vocabulary_pickles_small(paper: Vocabulary) -> None:
    with pytest.raises(ValueError, match="read-only"):
        paper.values[0] = 1.0
    data = pickle.dumps(paper)
    assert len(data) < 200
    assert pickle.loads(data).token(40_065) == paper.token(40_065)


def test_no_numeral_at_the_limit_or_without_a_number(vocabulary: Vocabulary) -> None:
    limit = {4: 999_950.0, 3: 999_500.0, 2: 995_000.0}[vocabulary.mantissa_digits]
    largest = float("9" * vocabulary.mantissa_digits + "0" * (6 - vocabulary.mantissa_digits))
    assert vocabulary.limit == limit
    assert vocabulary.decode(vocabulary.encode(math.nextafter(limit, 0))) == largest
    for bad in (limit, -limit, 1e300, math.inf, -math.inf, math.nan):
        with pytest.raises(InputError) as caught:
            vocabulary.encode([[1.0, 2.0], [bad, math.nan]])
        message = str(caught.value)
        assert f"value {bad} at position [1, 0]" in message and "\n" not in message
    far = np.zeros(40_000, np.float32)
    far[39_999] = np.nan
    with pytest.raises(InputError, match=r"position \[39999\]"):
        vocabulary.encode(far)


def test_clamp_counts(paper: Vocabulary) -> None:
    given = np.array([[1.0, 999_950.0], [-np.inf, 999_949.9]])
    clamped, count = paper.clamp(given)
    assert count == 2
    np.testing.assert_array_equal(clamped, [[1.0, 999_900.0], [-999_900.0, 999_949.9]])
    assert given[0, 1] == 999_950.0, "the caller's array stays as it was"
    assert paper.clamp(given.astype(np.float32))[0].dtype == np.float32
    paper.encode(clamped)
    with pytest.raises(InputError, match=r"nan at position \[1\]"):
        paper.clamp([1.0, np.nan])


def test_bad_input_is_named(paper: Vocabulary) -> None:
    with pytest.raises(InputError, match="mantissa_digits is 5"):
        Vocabulary(5)
    for mantissa, exponent in ((9, 0), (10_000, 0), (10, 6), (10, -5), (0, 1)):
        with pytest.raises(InputError, match=f"no numeral {mantissa}/{exponent}"):
            paper.indices(mantissa, exponent)
    for index in (-1, len(paper)):
        with pytest.raises(InputError, match=rf"index {index} at position \[1\]"):
            paper.decode([0, index])
    with pytest.raises(InputError, match="integers"):
        paper.decode([0.5])
    with pytest.raises(InputError, match="real numbers"):
        paper.encode(["1.0"])
