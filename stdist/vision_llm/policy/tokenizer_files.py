"""A checkpoint's tokenizer: its files know every numeral, so that transformers opens them; stdist itself does not.

A numeral's token id is arithmetic. transformers makes several objects of each added token, and of the 199,801 of four
digits copies them all more than once: half a minute a load. So they are written as text and left out when read.
"""

import json
import shutil
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stdist.numerals import Vocabulary

TOKENIZER = "tokenizer.json"
WEIGHTS = (".safetensors", ".bin")
PLACE = "numerals"
NUMERAL = """\
    {
      "id": %d,
      "content": "%s",
      "single_word": false,
      "lstrip": false,
      "rstrip": false,
      "normalized": true,
      "special": false
    }"""


def save_full_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, path: Path) -> None:
    """Writes into the folder ``path`` what ``save_pretrained`` would write of the tokenizer with every numeral added,
    numeral i at its length + i, byte for byte."""
    tokenizer.save_pretrained(path)
    if vocabulary.token(0) in tokenizer.get_vocab():
        return  # read from a base that has them
    tree = json.loads((path / TOKENIZER).read_text(encoding="utf-8"))
    tree["added_tokens"].append(PLACE)
    lines = (NUMERAL % (i, token) for i, token in enumerate(vocabulary.tokens(), len(tokenizer)))
    # As the tokenizers library lays it out.
    text = json.dumps(tree, indent=2, ensure_ascii=False).replace(f'"{PLACE}"', ",\n".join(lines).lstrip(), 1)
    (path / TOKENIZER).write_text(text, encoding="utf-8")


def load_text_tokenizer(path: Path, vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint without its numerals; with them, where they do not follow its last token."""
    file = path / TOKENIZER
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    zero = next((t["id"] for t in tree.get("added_tokens", ()) if t["content"] == vocabulary.token(0)), None)
    if zero is None:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not zero <= t["id"] < zero + len(vocabulary)]
    with tempfile.TemporaryDirectory() as folder:
        for other in path.iterdir():
            if other.is_file() and other.suffix not in WEIGHTS:
                shutil.copy(other, folder)
        (Path(folder) / TOKENIZER).write_text(json.dumps(tree), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) != zero:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tokenizer.name_or_path = str(path)
    return tokenizer
