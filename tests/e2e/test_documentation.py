"""README and docs do what they say: each document is played as one story (see documents.py for the directives)."""

import re
from pathlib import Path

import pytest

from tests.e2e.documents import TOP, DocumentError, play

PLAYED = [TOP / "README.md", TOP / "simulators/README.md", *sorted((TOP / "docs").rglob("*.md"))]
LINKED = [*PLAYED, TOP / "CONTRIBUTING.md", TOP / "SECURITY.md", TOP / "CHANGELOG.md"]
TICKS = "`" * 3


def name(path: Path) -> str:
    return str(path.relative_to(TOP))


@pytest.mark.parametrize("document", PLAYED, ids=name)
def test_every_block_does_what_the_document_says(document, tmp_path, record_property):
    for left_out in play(document, tmp_path):
        record_property("not run", left_out)


@pytest.mark.parametrize("document", LINKED, ids=name)
def test_links_lead_somewhere(document):
    text = re.sub(rf"^ *{TICKS}.*?^ *{TICKS}", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#[^)]*)?\)", text)
    assert [target for target in targets if not (document.parent / target).exists()] == []


def written(folder: Path, *parts: str) -> Path:
    path = folder / "STORY.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def block(language: str, *lines: str) -> str:
    return "\n".join([TICKS + language, *lines, TICKS])


def test_a_story_keeps_its_folder_variables_and_names(tmp_path):
    story = written(
        tmp_path,
        "<!-- test: file model.onnx -->",
        "<!-- test: hidden\nmkdir there\n-->",
        block("bash", "cd there", "GREETING='good day'"),
        "<!-- test: saved as there/terms.toml -->\n" + block("toml", 'licensee = "A"', 'product = "P"'),
        block("python", "import os, pathlib", 'size = os.stat("../model.onnx").st_size'),
        block("console", '$ echo "$GREETING"', "good day", "$ ls", "terms.toml", "$ date", "..."),
        block("python", 'print(os.environ["GREETING"], size > 0)'),
        "<!-- test: output -->\n" + block("text", "good ... True"),
        "<!-- test: exits 3 -->\n" + block("sh", "exit 3"),
        "<!-- test: exits 1 -->\n" + block("python", "size.no_such_thing"),
        "<!-- test: output -->\n" + block("text", "Traceback...AttributeError..."),
        "<!-- test: not run: it would take a year -->\n" + block("bash", "sleep 1y"),
    )
    assert play(story, tmp_path / "story") == ["STORY.md:57: it would take a year"]


def test_the_simulated_tpm_answers(tmp_path):
    story = written(tmp_path, "<!-- test: tpm -->", block("bash", "tpm2_getrandom --hex 4"))
    assert play(story, tmp_path / "story") == []


@pytest.mark.parametrize(
    "parts",
    [
        [block("bash", "false", "true")],
        [block("bash", "echo good"), "<!-- test: output -->\n" + block("text", "bad")],
        [block("console", "$ echo good", "bad")],
        [block("python", "assert 1 > 2")],
        [block("python", "import os; os._exit(0)")],
        [block("toml", "product = ")],
        [block("json", "{'a': 1}")],
        [block("toml", 'licensee = "A"', 'product = "P"', "no_such_term = 1")],
        [block("", "true")],
        [block("haskell", "main = pure ()")],
        ["<!-- test: not run: -->\n" + block("bash", "true")],
        ["<!-- test: exist 1 -->\n" + block("bash", "true")],
        ["<!-- test: exits 0 -->"],
        [TICKS + "bash\ntrue"],
        ["> " + block("bash", "false")],
    ],
)
def test_what_is_wrong_is_found(parts, tmp_path):
    story = written(tmp_path, *parts)
    with pytest.raises(DocumentError):
        play(story, tmp_path / "story")
