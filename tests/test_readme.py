"""The pages are true: both languages say the same, and what they and the metadata name exists.

Their commands are run, or parsed, in test_readme_commands.py.
"""

import csv
import math
import re
import sys
import tomllib
from pathlib import Path
from statistics import mean, median, stdev

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
BENCHMARKS = [f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")]
DOCS = {f"docs/{path.name.replace('.ja.md', '.md')}" for path in (ROOT / "docs").glob("*.md")}
ENGLISH = ["README.md", *sorted(DOCS)]
JAPANESE = [name.replace(".md", ".ja.md") for name in ENGLISH]
PAGES = ENGLISH + JAPANESE
OTHERS = ["CONTRIBUTING.md", "benchmarks/results/README.md", "pretrained/a2c_breakout.md"]
WORDS = {"ten": "10", "tenth": "10", "fifteenth": "15", "sixteen": "16", "twenty": "20"}
WORDS |= {"fiftieth": "50", "million": "1000000"}
TOOLS = set("--index-url --logdir --no-index --shm-size --slow".split())  # of pip, git ...
TOOLS |= set("--nnodes --nproc-per-node --node-rank --master-addr --master-port".split())
TOOLS |= set("--rdzv-backend --rdzv-id --rdzv-endpoint --rdzv-conf --local-addr".split())
TOOLS |= {"--signals-to-handle", "--max-restarts"}  # of torchrun, like the rest of them
LONG = [f"10m_seed{seed}" for seed in range(1, 7)]
SHORT = ["3m6_seed4", "3m6_seed5", "3m6_seed6"]
PACKAGES = {  # import name: requirement, where they differ
    "cv2": "opencv-python",
    "imageio": "imageio[ffmpeg]",
    "pygame": "gymnasium[classic-control]",
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
    return [" ".join(code.split()) for code in codes] + re.findall(r"^!(.+)$", read(name), re.M)


def calls(lines: list[str]) -> set[tuple[str, str]]:
    """(program, its arguments) of each call of a Python file."""
    launch = r"\b(?:python|run|torchrun [^;]*?)\s([\w/]+\.py)\b([^;&|]*)"
    return {call for line in lines for call in re.findall(launch, line)}


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def known_flags(program: str) -> set[str]:
    """What tyro makes of the fields of a script's Args, or argparse of a benchmark's arguments."""
    if program in BENCHMARKS:
        return {"--help", *re.findall(r'add_argument\(\s*"(--[\w-]+)"', read(program))}
    args = re.search(r"^class Args:(.*?)^    def ", read(program), re.M | re.S)[1]
    fields = re.findall(r"^    ([\w-]+): (\w+)", args.replace("_", "-"), re.M)
    off = {f"--no-{name}" for name, kind in fields if kind == "bool"}
    return {"--help", *off, *(f"--{name}" for name, _ in fields)}


def rows(name: str) -> list[list[str]]:
    """The cells of all rows of its tables, without the rules below the headers."""
    found = re.findall(r"^\|(.*)\|$", read(name), re.M)
    return [[cell.strip() for cell in row.split("|")] for row in found if row.strip("-| ")]


def results(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmarks" / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_front_page_shows_what_the_raw_rows_say():
    shown = {row[0]: row[1:] for row in rows("README.md")}
    digits = [row for row in results("mnist_accuracy") if row["recipe"] == "default"]
    digits = [float(row["accuracy"]) for row in digits]
    assert f"{mean(digits):.1%} correct" in shown["[mnist.py](mnist.py)"] and len(digits) == 20
    for name in ("dqn", "ddqn", "dueling", "per", "a2c"):
        runs = results(f"cartpole_{name}")
        solved = [int(run["solved_episode"]) for run in runs if run["solved_episode"]]
        _, _, result, steps, _ = shown[f"[{name}_cartpole.py]({name}_cartpole.py)"]
        assert f"{len(solved)} of {len(runs)} seeds, episode {median(solved):g}" in result
        middle = median(int(run["steps"]) for run in runs)
        assert steps == f"{math.floor(middle + 0.5):,}"
    for timesteps, names in {"10,000,000": LONG, "3,600,000": SHORT}.items():
        runs = [results(f"breakout_scores_{name}") for name in names]
        runs = [[float(row["score"]) for row in run] for run in runs]
        means, games = [mean(run) for run in runs], sum(runs, [])
        cleared = mean(score >= 432 for score in games)
        cells = [f"{mean(means):.1f} ± {stdev(means):.0f}", f"{median(games):g}", f"{cleared:.0%}"]
        assert shown[timesteps][:3] == cells and len(games) == 100 * len(runs)


def numbers(text: str) -> set[str]:
    """Of more than one digit. 1,000 is 1000, 1万 is 10000; those in names (A2C, -v4) are none."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(\d+)万", lambda found: f"{found[1]}0000", text)
    return set(re.findall(r"(?<![A-Za-z\d_.])\d[\d.]*\d", text))


def links(name: str) -> list[str]:
    """What a page links to or shows: from ROOT, if it is here; page#anchor for a place in it."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(name)))
    here = [target if target[0] != "#" else Path(name).name + target for target in targets]
    folder = (ROOT / name).parent
    return [
        target if re.match(r"[a-z]+:", target)
        else (folder / target).resolve().relative_to(ROOT).as_posix() for target in here
    ]  # fmt: skip


# ---- the two languages -------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), list(zip(ENGLISH, JAPANESE)), ids=ENGLISH)
class TestBothLanguages:
    def test_the_same_blocks_of_code_in_the_same_order_and_the_same_calls(self, ours, theirs):
        assert blocks(ours) == blocks(theirs)
        assert calls(mentions(ours)) == calls(mentions(theirs))

    def test_sections_and_rows_of_tables_hold_the_same_numbers(self, ours, theirs):
        """Where English has a word, Japanese may have digits."""
        texts = [re.split(r"^## .+\n", read(name), flags=re.M) for name in (ours, theirs)]
        cells = [[" | ".join(row) for row in rows(name)] for name in (ours, theirs)]
        for english, japanese in [*zip(*texts, strict=True), *zip(*cells, strict=True)]:
            words = {WORDS[word] for word in re.findall(r"\w+", english.lower()) if word in WORDS}
            assert numbers(english) <= numbers(japanese) <= numbers(english) | words, japanese

    def test_links_are_the_same_and_lead_to_pages_of_the_same_language(self, ours, theirs):
        """Each page links to its twin; the front pages link to every page."""
        twin = dict(zip(PAGES, JAPANESE + ENGLISH))
        found = [{link.partition("#")[0] for link in links(name)} for name in (ours, theirs)]
        assert theirs in found[0] and {twin.get(link, link) for link in found[0]} == found[1]
        assert ours != "README.md" or found[0] >= DOCS


@pytest.mark.parametrize("name", JAPANESE)
def test_japanese_lines_break_where_a_reader_pauses(name):
    """Browsers draw a line break as a space."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-|<#*]|\s*\d\.|    )", prose(name)):
        for line in paragraph.strip().splitlines()[:-1]:
            assert line.endswith(tuple("、。：）*>")), line


# ---- what the pages say is there ---------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAGES, *OTHERS, "CHANGELOG.md"])
def test_every_link_picture_and_anchor_exists(name):
    for target in links(name):
        path, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / path).exists(), target
            headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings]
            assert not anchor or anchor in slugs, target


def test_every_picture_is_shown():
    shown = {link for name in PAGES for link in links(name)}
    for picture in ROOT.glob("benchmarks/results/*.[pg][ni][gf]"):
        assert picture.relative_to(ROOT).as_posix() in shown


@pytest.mark.parametrize(("name", "limit"), [("README", 165), ("docs/breakout", 260)])
def test_pages_are_short(name, limit):
    assert max(len(read(name + end).splitlines()) for end in (".md", ".ja.md")) <= limit


@pytest.mark.parametrize("name", PAGES + OTHERS)
def test_every_call_names_a_program_and_flags_that_exist(name):
    """A flag by itself is one that some program or a tool has. (CHANGELOG.md names old ones.)"""
    for program, arguments in calls(commands(name) + mentions(name)):
        its_own, _, _ = arguments.partition(" -- ")  # the rest is for the script that it calls
        assert flags(its_own) <= known_flags(program), program + arguments
    assert flags(read(name)) <= TOOLS.union(*map(known_flags, SCRIPTS + BENCHMARKS))


# ---- sources and inline metadata ---------------------------------------------------------------


def test_no_line_is_longer_than_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"


def needed(script: str) -> set[str]:
    """What a script imports, anywhere in it, under its names in requirements.txt."""
    modules = re.findall(r"^ *(?:import|from) ([\w.]+)", read(script), re.M)
    tops = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    # PyTorch imports TensorBoard without depending on it.
    tops |= {"tensorboard"} if "torch.utils.tensorboard" in modules else set()
    tops -= {"gymnasium"} if "pygame" in tops else set()  # that comes with an extra of gymnasium
    return {PACKAGES.get(top, top) for top in tops}


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_covers_what_the_file_imports_and_pins_it_alike(script):
    [block] = re.findall(r"^# /// script\n((?:#(?: .*)?\n)*?)# ///$", read(script), flags=re.M)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    assert metadata["requires-python"] == ">=3.11"
    pins = read("requirements.txt")
    pins = {*pins.split(), *pins.replace("[classic-control]", "").split()}
    pinned = [line for line in pins if line.partition("==")[0] in needed(script)]
    assert metadata["dependencies"] == sorted(pinned) and len(pinned) == len(needed(script))


def test_requirements_hold_nothing_that_no_script_needs():
    pinned = {line.partition("==")[0] for line in read("requirements.txt").split()}
    assert pinned == set().union(*map(needed, SCRIPTS)) - {"gymnasium"} | {"pytest"}
