"""README.md and README.ja.md say the same, and what they and the scripts' metadata say is true.

No script is run.
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
READMES = ["README.md", "README.ja.md"]
CHAPTERS = "本の章との対応"  # the one section that README.ja.md has alone

PACKAGES = {  # import name: requirement, where they differ
    "cv2": "opencv-python",
    "imageio": "imageio[ffmpeg]",
    "gymnasium": "gymnasium[classic-control]",
    "ale_py": "ale-py",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks: (language, content)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)


def commands(text: str) -> list[str]:
    """The lines of the ```sh blocks."""
    shell = [content for language, content in blocks(text) if language == "sh"]
    return [line for content in shell for line in content.splitlines() if line]


def sections(text: str) -> list[tuple[str, str]]:
    """(heading, content) of the part before the first ## heading and of each part after."""
    parts = re.split(r"^## (.+)\n", text, flags=re.M)
    return list(zip(["top", *parts[1::2]], parts[::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, row by row: the header first, without the rule below it."""
    found = re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.M)
    split = [[row[1:-1].split("|") for row in table.splitlines()] for table in found]
    return [[[c.strip() for c in row] for row in [table[0], *table[2:]]] for table in split]


def without_chapters(text: str) -> str:
    kept = [(heading, content) for heading, content in sections(text) if heading != CHAPTERS]
    return kept[0][1] + "".join(f"## {heading}\n{content}" for heading, content in kept[1:])


def numbers(text: str) -> list[str]:
    """1,000 is 1000. Digits that are part of a name (A2C, MP4, -v4) are none."""
    found = re.findall(r"(?<![A-Za-z\d_.])\d+(?:[.,_]\d+)*", text)
    return [number.replace(",", "").replace("_", "") for number in found]


def pins() -> dict[str, str]:
    """{package, with its extras: version} of requirements.txt."""
    return dict(line.split("==") for line in read("requirements.txt").split())


def metadata(script: str) -> dict:
    """What the inline metadata of a script (PEP 723) says."""
    [block] = re.findall(r"^# /// script\n((?:#(?: .*)?\n)*?)# ///$", read(script), flags=re.M)
    return tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))


def imported(script: str) -> set[str]:
    """The packages that a script imports, anywhere in it, under their names in requirements.txt."""
    modules = set()
    for node in ast.walk(ast.parse(read(script))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{script} imports from a neighbour"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    if any(module.startswith("torch.utils.tensorboard") for module in modules):
        packages.add("tensorboard")  # which PyTorch imports without depending on it
    return {PACKAGES.get(package, package) for package in packages}


def flags(script: str) -> set[str]:
    """The command-line flags that tyro makes of a script's Args, or argparse of a benchmark's."""
    if script.startswith("benchmarks/"):
        return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', read(script)))
    body = ast.parse(read(script)).body
    [args] = [node for node in body if getattr(node, "name", None) == "Args"]
    found = {"--help"}
    for field in args.body:
        if isinstance(field, ast.AnnAssign):
            name = field.target.id.replace("_", "-")
            found.add(f"--{name}")
            if ast.unparse(field.annotation) == "bool":
                found.add(f"--no-{name}")
    return found


# ---- the two languages -------------------------------------------------------


def test_both_name_the_same_commands():
    ours, theirs = (Counter(commands(read(name))) for name in READMES)
    assert ours, "no command found"
    assert ours == theirs


def test_both_have_the_same_code_in_the_same_order():
    assert blocks(read("README.md")) == blocks(read("README.ja.md"))


def test_the_tables_hold_the_same_numbers():
    """Row by row, in any order within a row. A word (five) in one is to be a word in the other."""
    ours, theirs = (tables(without_chapters(read(name))) for name in READMES)
    assert ours and [len(table) for table in ours] == [len(table) for table in theirs]
    for our_table, their_table in zip(ours, theirs, strict=True):
        for our_row, their_row in zip(our_table, their_table, strict=True):
            found = [sorted(numbers(" | ".join(row))) for row in (our_row, their_row)]
            assert found[0] == found[1], f"{our_row} and {their_row}"


def test_the_sections_hold_the_same_numbers():
    """All but those of a single digit, which may well be words in one of the languages."""
    ours, theirs = (sections(without_chapters(read(name))) for name in READMES)
    assert len(ours) == len(theirs) > 1
    for (our_heading, our_text), (their_heading, their_text) in zip(ours, theirs, strict=True):
        found = [{n for n in numbers(text) if len(n) > 1} for text in (our_text, their_text)]
        differ = f"only in '{our_heading}': {found[0] - found[1]}"
        assert found[0] == found[1], f"{differ}, only in '{their_heading}': {found[1] - found[0]}"


def test_they_link_to_each_other():
    assert "](README.md)" in read("README.ja.md")
    assert "](README.ja.md)" in read("README.md")


def test_every_chapter_of_the_book_has_its_command():
    [table] = tables(dict(sections(read("README.ja.md")))[CHAPTERS])
    assert len(table) == 10  # a header and nine chapters
    for _, link, command, back in table[1:]:
        script = re.fullmatch(r"\[(\w+\.py)\]\(\1\)", link)[1]
        assert command.startswith(f"`python {script}"), command
        assert set(re.findall(r"--[a-z-]+", command + back)) <= flags(script), command + back


# ---- what they say is there --------------------------------------------------


@pytest.mark.parametrize("name", READMES)
def test_every_link_and_picture_exists(name):
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", read(name), flags=re.M | re.S))
    targets = re.findall(r"\]\(<?([^)\s>]+)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    here = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert here, "no link found"
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", read(name), flags=re.M)
    }
    for target in here:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), f"{name} links to {target}"
        assert path or anchor in anchors, f"{name} links to {target}"


@pytest.mark.parametrize("name", READMES)
def test_the_table_of_scripts_is_complete_and_its_line_counts_are_right(name):
    [table] = [table for table in tables(read(name)) if {"lines", "行数"} & set(table[0])]
    [column] = [i for i, title in enumerate(table[0]) if title in ("lines", "行数")]
    said = {re.match(r"\[(\w+\.py)\]", row[0])[1]: row[column] for row in table[1:]}
    counted = {script: str(len(read(script).splitlines())) for script in SCRIPTS}
    wrong = [
        f"{script} has {counted.get(script)} lines, not {said.get(script)}"
        for script in sorted(said | counted)
        if said.get(script) != counted.get(script)
    ]
    assert not wrong, f"{name}: {'; '.join(wrong)}"


@pytest.mark.parametrize("name", READMES)
def test_every_command_names_a_file_and_flags_that_exist(name):
    """In blocks and in the text. A flag by itself is one that some script or a tool here has."""
    text = read(name)
    for command in commands(text) + re.findall(r"`([^`\n]*)`", text):
        for script, rest in re.findall(r"\bpython (\S+\.py)([^;&]*)", command):
            assert (ROOT / script).exists(), f"{name}: {command}"
            if script not in SCRIPTS:  # a program in benchmarks/, which may hand flags on to a script after --
                rest = rest.split(" -- ")[0]
            used = set(re.findall(r"--[a-z][\w-]*", rest))
            assert used <= flags(script), f"{name}: {command}"
    tools = {"--index-url", "--logdir", "--max-restarts", "--nproc-per-node", "--shm-size"}
    programs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.py")]
    known = tools.union(*map(flags, SCRIPTS + programs))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


# ---- inline metadata ---------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_covers_what_the_file_imports_and_pins_it_alike(script):
    found = metadata(script)
    assert found["requires-python"] == ">=3.11"
    needed = sorted(f"{package}=={pins()[package]}" for package in imported(script))
    assert found["dependencies"] == needed


def test_requirements_hold_nothing_that_no_script_needs():
    assert set(pins()) == set().union(*map(imported, SCRIPTS)) | {"pytest"}
