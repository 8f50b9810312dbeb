"""The public names, as the README shows them."""

import re
from pathlib import Path

import tandemqa

README = Path(__file__).parents[1] / "README.md"


def test_every_public_name_is_there():
    for name in tandemqa.__all__:
        assert getattr(tandemqa, name) is not None


def test_the_readme_lines_run(tiny_model, tiny_dataset, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tiny_dataset)
    recipe = tandemqa.load_recipe("quick", [f"retriever.model={tiny_model}", f"reranker.model={tiny_model}"])
    code = code.replace('out="runs/mine"', 'out="runs/mine", recipe=recipe')
    names: dict[str, object] = {"recipe": recipe}
    exec(code, names)
    printed = capsys.readouterr().out
    assert "re-ranked" in printed and len(printed.strip().splitlines()) >= 5
