"""What the documents say is so: public examples run, and the README's too."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastnorm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def documented() -> dict[str, object]:
    names = {f"fastnorm.{name}": getattr(fastnorm, name) for name in fastnorm.__all__}
    functions = {
        f"fastnorm.functional.{name}": getattr(fastnorm.functional, name)
        for name in fastnorm.functional.__all__
    }
    del names["fastnorm.functional"]
    return {"fastnorm": fastnorm, **names, **functions}


@pytest.mark.parametrize("name", documented())
def test_a_public_name_has_a_docstring_whose_example_runs(name: str) -> None:
    thing = documented()[name]
    # vars: a docstring that is inherited from torch's class documents torch's class
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert text, f"{name} has no docstring of its own"
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert examples.examples, f"{name} has no example"
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    with fastnorm.backend("auto"):
        runner.run(examples, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)
    assert len(code.strip().splitlines()) <= 12
    names: dict[str, object] = {}
    exec(code, names)
    told = capsys.readouterr().out
    assert "BatchNorm2d" in told
    assert "changed" in told
    model = names["model"]
    assert isinstance(model, torch.nn.Sequential)
    assert [type(layer) for layer in model[:3]] == [
        torch.nn.Conv2d,
        torch.nn.BatchNorm2d,
        torch.nn.SiLU,
    ]


def test_quick_start_begins_with_two_commands_of_one_line_each() -> None:
    section = README.split("\n## Quick start\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```bash\n([^\n]+)\n```$", section, flags=re.M)
    assert len(blocks) == 2
    assert section.count("```") == 4
    assert section.lstrip().startswith("```bash\n")
    between = section.split("```")[2]
    assert not between.strip(), "nothing stands between the two"
    assert blocks[0].endswith("python -m fastnorm demo")
    assert blocks[1].endswith("python -m pytest -n 2")


def test_the_readme_names_every_public_layer_function_and_activation() -> None:
    from fastnorm.ops.activation import NAMES

    text = README.replace("`2d`, `3d`", "")
    for name in [*fastnorm.__all__, *fastnorm.functional.__all__]:
        stem = re.sub(r"[23]d$", "1d", name)
        assert stem in text, name
    listed = re.findall(r"input, name\)`: (.*?)\.\n", README, flags=re.S)
    assert re.split(r",\s+", listed[0]) == list(NAMES)
