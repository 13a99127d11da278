"""The pages are true: both languages say the same, and what they and the metadata name exists.

No script is run; the commands are, in test_readme_commands.py.
"""

import ast
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
PROGRAMS = SCRIPTS + [f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")]
DOCS = {f"docs/{path.name.replace('.ja.md', '.md')}" for path in (ROOT / "docs").glob("*.md")}
ENGLISH = ["README.md", *sorted(DOCS)]
JAPANESE = [name.replace(".md", ".ja.md") for name in ENGLISH]
PAGES = ENGLISH + JAPANESE
OTHERS = ["CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/README.md"]
OTHERS += ["pretrained/a2c_breakout.md"]
TOOLS = {"--index-url", "--logdir", "--max-restarts", "--nproc-per-node", "--shm-size"}
WORDS = {"ten": "10", "tenth": "10", "fifth": "5", "fifteenth": "15", "sixteen": "16"}
WORDS |= {"fiftieth": "50", "million": "1000000"}
PACKAGES = {  # import name: requirement, where they differ
    "cv2": "opencv-python",
    "imageio": "imageio[ffmpeg]",
    "gymnasium": "gymnasium[classic-control]",
    "ale_py": "ale-py",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """The fenced blocks: (language, content)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(name), flags=re.M | re.S)


def prose(name: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(name), flags=re.M | re.S)


def commands(name: str) -> list[str]:
    """The lines of the sh blocks, taken apart at &&."""
    lines = "".join(content for language, content in blocks(name) if language == "sh").splitlines()
    return [part for line in lines for part in line.split(" && ")]


def mentions(name: str) -> list[str]:
    """The `code` in the text, also where it goes on in the next line, and the ! lines of cells."""
    codes = re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", prose(name))
    cells = "".join(content for language, content in blocks(name) if language == "python")
    return [" ".join(code.split()) for code in codes] + re.findall(r"^!(.+)$", cells, flags=re.M)


def calls(lines: list[str]) -> list[tuple[str, str]]:
    """(program, its arguments) of each call of a Python file."""
    launch = r"\b(?:python|run|torchrun [^;]*?)\s([\w/]+\.py)\b([^;&|]*)"
    return [call for line in lines for call in re.findall(launch, line)]


def sections(name: str) -> list[str]:
    return re.split(r"^## .+\n", read(name), flags=re.M)


def tables(name: str) -> list[list[list[str]]]:
    """The cells of each table, row by row: the header first, without the rule below it."""
    found = re.findall(r"(?:^\|.*\|\n)+", read(name) + "\n", flags=re.M)
    split = [[row[1:-1].split("|") for row in table.splitlines()] for table in found]
    return [[[c.strip() for c in row] for row in [table[0], *table[2:]]] for table in split]


def numbers(text: str) -> set[str]:
    """1,000 is 1000. Digits that are part of a name (A2C, MP4, -v4) are none."""
    found = re.findall(r"(?<![A-Za-z\d_.])\d+(?:[.,_]\d+)*", text)
    return {number.replace(",", "").replace("_", "") for number in found}


def numbers_apart(english: str, japanese: str) -> set[str]:
    """Numbers in one text alone. Where English has a word, Japanese may have digits."""
    ours, theirs = numbers(english), numbers(japanese)
    words = {WORDS[word] for word in re.findall(r"\w+", english.lower()) if word in WORDS}
    return ours - theirs | {number for number in theirs - ours - words if len(number) > 1}


def links(name: str) -> list[str]:
    """What a page links to or shows: from ROOT, if it is here; page#anchor for a place in it."""
    text = re.sub(r"`[^`]*`", "", prose(name))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    folder = (ROOT / name).parent
    here = [name + target if target[0] == "#" else target for target in targets]
    return [
        target if re.match(r"[a-z]+:", target) or target.startswith(f"{name}#")
        else (folder / target).resolve().relative_to(ROOT).as_posix() for target in here
    ]  # fmt: skip


@cache
def flags(program: str) -> set[str]:
    """The command-line flags that tyro makes of a script's Args, or argparse of a benchmark's."""
    if program not in SCRIPTS:
        return {"--help", *re.findall(r'add_argument\(\s*"(--[\w-]+)"', read(program))}
    [args] = [x for x in ast.parse(read(program)).body if getattr(x, "name", None) == "Args"]
    fields = [field for field in args.body if isinstance(field, ast.AnnAssign)]
    names = {f.target.id.replace("_", "-"): ast.unparse(f.annotation) for f in fields}
    off = {f"--no-{name}" for name, annotation in names.items() if annotation == "bool"}
    return {"--help", *off, *(f"--{name}" for name in names)}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


# ---- the two languages -------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), list(zip(ENGLISH, JAPANESE)), ids=ENGLISH)
class TestBothLanguages:
    def test_code_blocks_are_the_same_in_the_same_order(self, ours, theirs):
        assert blocks(ours) == blocks(theirs)

    def test_the_text_names_the_same_calls(self, ours, theirs):
        assert set(calls(mentions(ours))) == set(calls(mentions(theirs)))

    def test_sections_and_rows_of_tables_hold_the_same_numbers(self, ours, theirs):
        rows = [[" | ".join(row) for table in tables(name) for row in table]
                for name in (ours, theirs)]  # fmt: skip
        pairs = zip(sections(ours) + rows[0], sections(theirs) + rows[1], strict=True)
        assert [(*pair, numbers_apart(*pair)) for pair in pairs if numbers_apart(*pair)] == []

    def test_links_are_the_same_and_lead_to_pages_of_the_same_language(self, ours, theirs):
        """Each page links to its twin; the front pages link to every page."""
        twin = dict(zip(ENGLISH + JAPANESE, JAPANESE + ENGLISH, strict=True))
        found = [{link.partition("#")[0] for link in links(name)} for name in (ours, theirs)]
        assert theirs in found[0] and ours in found[1]
        assert {twin.get(link, link) for link in found[0]} == found[1]
        if ours == "README.md":
            assert found[0] >= set(ENGLISH) - {ours}


# ---- what the pages say is there ---------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES + OTHERS)
def test_every_link_picture_and_anchor_exists(name):
    for target in links(name):
        path, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / path).exists(), target
            headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings]
            assert not anchor or anchor in slugs, target


@pytest.mark.parametrize("name", PAGES + OTHERS[1:])
def test_every_call_names_a_program_and_flags_that_exist(name):
    """A flag by itself is one that some program or a tool has. (CHANGELOG.md names old ones.)"""
    for program, arguments in calls(commands(name) + mentions(name)):
        assert program in PROGRAMS, program
        its_own, _, handed_on = arguments.partition(" -- ")
        assert flags_in(its_own) <= flags(program), program + arguments
        if handed_on:  # by a benchmark to the script that it names first
            assert flags_in(handed_on) <= flags(f"{its_own.split()[0]}.py"), program + arguments
    assert flags_in(read(name)) <= TOOLS.union(*map(flags, PROGRAMS))


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
class TestFrontPage:
    def test_it_is_short(self, name):
        assert len(read(name).splitlines()) < 180

    def test_the_set_up_commands_stand_alone(self, name):
        for command in ("python a2c_breakout.py --num-envs 16", "python -m pytest"):
            assert ("sh", f"pip install -r requirements.txt && {command}\n") in blocks(name)

    def test_line_counts_in_the_table_of_scripts(self, name):
        [table] = [table for table in tables(name) if {"lines", "行数"} & set(table[0])]
        [column] = [i for i, title in enumerate(table[0]) if title in ("lines", "行数")]
        said = {re.match(r"\[(\w+\.py)\]", row[0])[1]: row[column] for row in table[1:]}
        assert said == {script: str(len(read(script).splitlines())) for script in SCRIPTS}


@pytest.mark.parametrize("name", PAGES + OTHERS)
def test_every_number_is_filled_in(name):
    assert re.findall(r"@@\w*@@|@@", read(name)) == []


# ---- sources and inline metadata ---------------------------------------------------------------


@pytest.mark.parametrize("folder", [".", "tests", "benchmarks"])
def test_no_line_is_longer_than_100_columns(folder):
    for path in (ROOT / folder).glob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"


def pins() -> dict[str, str]:
    """{package, with its extras: version} of requirements.txt."""
    return dict(line.split("==") for line in read("requirements.txt").split())


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_covers_what_the_file_imports_and_pins_it_alike(script):
    [block] = re.findall(r"^# /// script\n((?:#(?: .*)?\n)*?)# ///$", read(script), flags=re.M)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    assert metadata["requires-python"] == ">=3.11"
    needed = sorted(f"{package}=={pins()[package]}" for package in imported(script))
    assert metadata["dependencies"] == needed


def test_requirements_hold_nothing_that_no_script_needs():
    assert set(pins()) == set().union(*map(imported, SCRIPTS)) | {"pytest"}
