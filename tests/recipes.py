"""The code of each section of docs/recipes.md, by its heading."""

import re
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).parents[1] / "docs/recipes.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", TEXT, re.MULTILINE))
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in SECTIONS.items()}
RECIPES = {name: "\n".join(blocks) for name, blocks in BLOCKS.items() if blocks}
WITH_TORCH_ALONE = ("GradScaler", "State surgery")  # test_docs.py runs them
OF_PROCESSES = ("FSDP2", "DeepSpeed")  # test_distributed.py and test_deepspeed.py run them


def run(recipe: str, **names: Any) -> dict[str, Any]:
    """The names that there are after the code, which begins with those given."""
    exec(RECIPES[recipe], names)  # noqa: S102 (our own documentation)
    return names
