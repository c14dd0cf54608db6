"""The code in the documents runs: each document in an empty folder, its blocks from top to bottom.

``python`` blocks of a document share one namespace, like the cells of a notebook; one with ``>>>`` is also
checked for what it shows. ``bash`` blocks run with ``-euo pipefail``. Other languages are not code to run.
Two comments, which the reader of the page does not see, steer a block from the line above it::

    <!-- not run: needs the ImageNet files -->        this block only stands there, and this is why
    <!-- before: Path("photos").mkdir() -->            Python that makes what the reader would bring along
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.md", "core/*.md", "packages/*/*.md", "docs/**/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
BLOCK = re.compile(
    r"^(?:<!-- *(?P<mark>not run|before):(?P<text>.*?)-->\s*^)?"
    r"(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


class Block(NamedTuple):
    """A fenced block: its language, code, the line its code starts on, and the comment above it."""

    language: str
    code: str
    line: int
    mark: str | None
    text: str


def blocks_of(document: str) -> list[Block]:
    return [
        Block(
            language=found["language"],
            code=textwrap.dedent(found["code"]),
            line=document.count("\n", 0, found.start("code")) + 1,
            mark=found["mark"],
            text=textwrap.dedent(found["text"] or "").strip(),
        )
        for found in BLOCK.finditer(document)
    ]


def run_python(code: str, namespace: dict[str, object], document: Path, line: int) -> None:
    if ">>> " not in code:
        # The empty lines in front make a traceback point into the document.
        exec(compile("\n" * (line - 1) + code, str(document), "exec"), namespace)
        return
    test = doctest.DocTestParser().get_doctest(code, namespace, document.name, str(document), line - 1)
    complaints: list[str] = []
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    doctest.DocTestRunner(optionflags=options).run(test, out=complaints.append, clear_globs=False)
    if complaints:
        raise AssertionError("".join(complaints))
    namespace.update(test.globs)


def run_bash(code: str, document: Path, line: int) -> None:
    command = ["bash", "-euo", "pipefail", "-c", code]
    # The console scripts of this environment, also where it is not activated.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    said = f"{code}\n{done.stdout}{done.stderr}"
    assert done.returncode == 0, f"{document}:{line}: exit code {done.returncode}\n{said}"


def run_document(document: Path) -> int:
    """Run the blocks of a document in the current folder; return how many ran."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks_of(document.read_text(encoding="utf-8")):
        if block.mark == "not run":
            assert len(block.text.split()) >= 2, f"{document}:{block.line}: say why this block is not run"
            continue
        if block.mark == "before":
            run_python(block.text, namespace, document, block.line)
        if block.language == "python":
            run_python(block.code, namespace, document, block.line)
        elif block.language == "bash":
            run_bash(block.code, document, block.line)
        else:
            assert block.language not in {"sh", "shell", "console", "py", "pycon"}, (
                f"{document}:{block.line}: call it bash or python, so that it runs"
            )
            continue
        ran += 1
    return ran


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if run_document(document) == 0:
        pytest.skip("no block of it is to be run")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nraise KeyError('here')\n```\n", "here"),
        ("```python\n>>> 1 + 1\n3\n```\n", "Expected:\n    3\nGot:\n    2"),
        ("```bash\nfalse | true\n```\n", "exit code 1"),
        ("- in a list\n\n  ```bash\n  exit 3\n  ```\n", "exit code 3"),
        ("<!-- not run: -->\n```bash\ntrue\n```\n", "say why"),
        ("```console\n$ true\n```\n", "call it bash"),
    ],
)
def test_wrong_block_is_noticed(text: str, complaint: str, tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text(text)
    with pytest.raises((AssertionError, KeyError), match=complaint):
        run_document(document)


def test_blocks_share_a_namespace_and_marks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "right.md"
    document.write_text(
        "<!-- before:\nfrom pathlib import Path\nPath('photo').write_text('owl')\n-->\n"
        "```python\nname = Path('photo').read_text()\n```\n"
        "```text\nnot code\n```\n<!-- not run: would fail -->\n```bash\nfalse\n```\n"
        "```python\n>>> name\n'owl'\n```\n```bash\ntest -f photo\n```\n"
    )
    assert run_document(document) == 3
