"""The first code of each section of docs/recipes.md, by its heading."""

import re
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
RECIPES = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


def run(recipe: str, **names: Any) -> dict[str, Any]:
    """The names that there are after the code, which begins with those given."""
    exec(RECIPES[recipe], names)  # noqa: S102 (our own documentation)
    return names
