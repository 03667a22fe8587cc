"""A configuration is read in less than a second: none of the libraries that train it is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / "configs"
READ = """
import sys
from pathlib import Path
import stdist.cli
from stdist.runs.recipes import load_config, recipe_of

recipe_of(load_config(Path(sys.argv[1])))
print([name for name in ("torch", "transformers", "peft", "ray", "deepspeed") if name in sys.modules])
"""


@pytest.mark.parametrize("name", ["milan_7b", "nyc_urbanpg", "metr_few_shot", "nyc_continual"])
def test_no_library_that_trains_is_imported(name):
    command = [sys.executable, "-c", READ, str(CONFIGS / f"{name}.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", ""), done.stderr
