"""Tests of play_breakout.py: what is played, counted, kept, filmed and refused."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from launch import Process
from PIL import Image
from short_runs import Bomb, policy, source, start

import a2c_breakout
import play_breakout
from play_breakout import ActorCritic, Args, Game, load_network, make_env

SCRIPT = Path(play_breakout.__file__)
BREAKOUT, PONG = "BreakoutNoFrameskip-v4", "PongNoFrameskip-v4"
NOOP, FIRE, RIGHT, LEFT = range(4)
BY_CHANCE = (0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def network() -> ActorCritic:
    network = ActorCritic(4)
    network.load_state_dict(torch.load(policy()))
    return network


class Always(torch.nn.Module):
    """A policy with the same logits whatever it sees; at one decision Ctrl-C is pressed."""

    def __init__(self, *logits: float, interrupted_at: int | None = None):
        super().__init__()
        self.logits, self.interrupted_at, self.batches = torch.tensor(logits), interrupted_at, []

    def forward(self, frames):
        if len(self.batches) == self.interrupted_at:
            signal.raise_signal(signal.SIGINT)
        self.batches.append(len(frames))
        return torch.zeros(len(frames)), self.logits.expand(len(frames), -1)


@pytest.fixture
def played(monkeypatch, tmp_path):
    """play() with a policy of ours and real games; returns the result and the games.

    With frames the emulator ends a game after so many, a quarter as many decisions. Unless
    filming, no film is made.
    """
    make, film = gym.make, play_breakout.film

    def play(policy, frames=None, filming=False, **flags):
        games, play.filmed = [], []
        limit = {"max_num_frames_per_episode": frames} if frames else {}

        class Kept(Game):
            def __init__(self, *args):
                super().__init__(*args)
                games.append(self)

        def film_or_not(game, *args, **options):
            play.filmed.append(game)
            if filming:
                film(game, *args, **options)

        monkeypatch.setattr(play_breakout.gym, "make", lambda *a, **k: make(*a, **k | limit))
        monkeypatch.setattr(play_breakout, "Game", Kept)
        monkeypatch.setattr(play_breakout, "load_network", lambda path, env: policy)
        monkeypatch.setattr(play_breakout, "film", film_or_not)
        return play_breakout.play(Args(**{"runs_dir": tmp_path, "seed": 50} | flags)), games

    return play


def only_run(runs_dir: Path) -> tuple[Path, dict]:
    """The only folder of a run, and its result.json."""
    [run_dir] = runs_dir.iterdir()
    return run_dir, json.loads((run_dir / "result.json").read_text())


def count_frames(path: Path) -> int:
    with imageio.get_reader(path) as film:
        return sum(1 for _ in film)


# ---- playing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [BREAKOUT, PONG])
def test_whole_games_are_those_of_training(env_id):
    ours, training = make_env(env_id, whole_games=True), a2c_breakout.make_env(env_id)
    assert np.array_equal(ours.reset(seed=5)[0], training.reset(seed=5)[0])
    lives_lost = 0
    for action in np.random.default_rng(0).integers(0, 4, 130):
        frames, reward, terminated, truncated, _ = ours.step(action)
        expected, *rest, _ = training.step(action)
        assert np.array_equal(frames, expected) and rest == [reward, terminated, truncated]
        if terminated or truncated:
            lives_lost += 1
            assert np.array_equal(ours.reset()[0], training.reset()[0])
    assert lives_lost > 0 or env_id == PONG


def test_the_network_is_that_of_training(network):
    training = a2c_breakout.ActorCritic(4)
    training.load_state_dict(network.state_dict())
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    for ours, theirs in zip(network(frames), training(frames)):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


def test_an_attempt_is_one_life_with_fresh_bricks_and_no_noops():
    env = make_env(BREAKOUT, whole_games=False)
    first = Game(env, seed=3, whole=False)
    start, lives, generator = first.frames.copy(), [], np.random.default_rng(1)
    while first.score is None:
        first.step(int(generator.integers(4)))
        lives.append(env.unwrapped.ale.lives())
    assert lives[-1] == 4 and set(lives[:-1]) == {5}
    assert first.score == env.get_wrapper_attr("game")["score"]
    # The next attempt on the same emulator begins where every game begins, on its first frame.
    second = Game(env, seed=4, whole=False)
    assert np.array_equal(second.frames, start)
    assert env.unwrapped.ale.lives() == 5 and env.unwrapped.ale.getEpisodeFrameNumber() == 0
    assert (second.score, second.actions) == (None, [])


def test_a_whole_game_is_five_lives_and_its_score_their_sum(monkeypatch):
    env = make_env(BREAKOUT, whole_games=True)
    rewards, step = [], env.unwrapped.step  # of every frame, below all wrappers

    def spy(action):
        answer = step(action)
        rewards.append(answer[1])
        return answer

    monkeypatch.setattr(env.unwrapped, "step", spy)
    game = Game(env, seed=0, whole=True)
    noops, restarts, generator = len(rewards), 0, np.random.default_rng(3)
    assert 1 <= noops <= 30
    while game.score is None:
        lives = env.unwrapped.ale.lives()
        game.step(int(generator.integers(4)))
        if game.score is None and env.unwrapped.ale.lives() < lives:
            restarts += 1
            assert not game.frames[:3].any() and game.frames[3].any()
    assert env.unwrapped.ale.lives() == 0 and restarts == 4
    assert game.score == sum(rewards) > 0
    # Four frames a decision and for the no-op after each lost life; the last ones are cut short.
    assert 0 <= noops + 4 * (len(game.actions) + restarts) - len(rewards) < 4 * 5


def test_actions_are_drawn_from_the_policy_or_are_the_likeliest():
    env = make_env(BREAKOUT, whole_games=False)
    games = [Game(env, seed, whole=False) for seed in range(2)]
    policy = Always(*np.log([0.1, 0.2, 0.3, 0.4]))
    drawn = np.array([play_breakout.act(policy, games, False, "cpu") for _ in range(500)])
    frequencies = [(drawn == action).mean() for action in range(4)]
    assert np.allclose(frequencies, [0.1, 0.2, 0.3, 0.4], atol=0.06)
    assert (drawn[:, 0] != drawn[:, 1]).any()
    assert play_breakout.act(policy, games, True, "cpu") == [LEFT, LEFT]


def test_each_game_is_the_same_whatever_is_played_beside_it(played, network):
    _, games = played(network, frames=120, seed=20, full_games=18.0)  # a batch of 16, and one of 2
    assert [game.seed for game in games] == list(range(20, 38))
    assert len({tuple(game.actions) for game in games}) == 18
    for together in (games[0], games[15], games[17]):
        _, [alone] = played(network, frames=120, seed=together.seed, full_games=1)
        assert (alone.score, alone.actions) == (together.score, together.actions)


def test_attempts_go_on_until_one_is_over_the_target(played, capsys, tmp_path):
    policy = Always(*BY_CHANCE)
    result, games = played(policy, target_score=0)
    assert result["scores"] == [0, 0, 0, 0, 2] and policy.batches[0] == max(policy.batches) == 1
    assert [game.seed for game in games] == [50, 51, 52, 53, 54] and played.filmed == games[-1:]
    assert "attempt 4: 0\nattempt 5: 2\n" in capsys.readouterr().out
    assert only_run(tmp_path)[1] == result
    assert result.keys() == {"seed", "seconds", "versions", "scores", "mean", "std", "min", "max"}


def test_when_the_target_is_missed_the_best_is_filmed_all_the_same(played, capsys):
    result, games = played(Always(*BY_CHANCE), seed=53, max_attempts=3)
    assert result["scores"] == [0, 2, 0] and played.filmed == games[1:2]
    assert (result["mean"], result["min"], result["max"]) == (pytest.approx(2 / 3), 0, 2)
    assert result["std"] == pytest.approx(math.sqrt(8 / 9))
    out = capsys.readouterr().out
    assert "mean 0.7, standard deviation 0.9, min 0, max 2\nfilming attempt 2" in out


@pytest.mark.parametrize(("chance", "lives"), [(0.0, 1), (0.25, 3)])
def test_greedy_attempts_that_are_all_alike_are_played_once(played, chance, lives):
    flags = {"greedy": True, "sticky_actions": chance, "max_attempts": 3}
    _, games = played(Always(0.0, 0.0, 0.0, 9.0), frames=120, **flags)
    assert len(games) == lives and games[0].actions == [LEFT] * 30


def test_a_random_game_is_a_whole_one_and_its_actions_are_equally_likely(played, tmp_path):
    result, games = played(None, random=True, full_games=3, env_id=PONG)
    assert all(-21 <= score < -10 for score in result["scores"]) and len(result["scores"]) == 3
    actions = np.concatenate([game.actions for game in games])
    assert np.allclose(np.bincount(actions) / len(actions), 1 / 6, atol=0.03)
    repeated, _ = played(None, random=True, seed=51, env_id=PONG)
    assert repeated["scores"] == result["scores"][1:2]


def test_ctrl_c_keeps_the_batches_that_are_over(played, tmp_path):
    """Single games that are over are, of those that began together, the short ones."""
    with pytest.raises(KeyboardInterrupt):
        played(Always(*BY_CHANCE, interrupted_at=40), frames=120, full_games=18)
    run_dir, result = only_run(tmp_path)
    assert len(result["scores"]) == 16 and len(played.filmed) == 1
    shutil.rmtree(run_dir)
    with pytest.raises(KeyboardInterrupt):
        played(Always(*BY_CHANCE, interrupted_at=5), full_games=2)
    [run_dir] = tmp_path.iterdir()
    assert [path.name for path in run_dir.iterdir()] == ["args.json"] and not played.filmed


# ---- filming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_the_films_show_every_decision_of_the_best_attempt(chance, played, tmp_path, capsys):
    flags = {"filming": True, "seed": 53, "max_attempts": 2, "sticky_actions": chance}
    played(Always(*BY_CHANCE), gif=True, **flags)
    run_dir, result = only_run(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == str(run_dir / "film.mp4")
    best = played.filmed[0]
    assert best.score == result["max"] and best.seed == 53 + np.argmax(result["scores"])
    game = gym.make(BREAKOUT, obs_type="rgb").unwrapped  # no wrappers
    game.reset(seed=best.seed)
    rng, goes_on, screens = game.np_random, 0, []
    for action in best.actions:
        rng.gumbel(size=4)  # by which the action was drawn
        for _ in range(4):
            goes_on = action if chance == 0 or rng.random() >= chance else goes_on
            screen = game.step(goes_on)[0]
        screens.append(screen)
    assert len(screens) > 20

    with imageio.get_reader(run_dir / "film.mp4") as film:
        assert film.get_meta_data()["size"] == (480, 630) and film.get_meta_data()["fps"] == 15
        frames = [frame for frame in film]
    assert len(frames) == len(screens)
    for frame, screen in zip(frames, screens):
        large = screen.repeat(3, axis=0).repeat(3, axis=1).astype(int)
        assert np.abs(frame - large).mean() < 1.2  # H.264 loses a little
    with Image.open(run_dir / "film.gif") as gif:
        assert gif.size == (160, 210) and gif.info["loop"] == 0  # it plays for ever
        shown, milliseconds = [], 0
        for index in range(gif.n_frames):
            gif.seek(index)
            shown.append(np.array(gif.convert("RGB")))
            milliseconds += gif.info["duration"]
    assert np.array_equal(shown, screens)
    assert milliseconds == pytest.approx(len(screens) * 1000 / 15, abs=10)


@pytest.mark.slow
def test_a_policy_that_never_serves_is_filmed_in_flat_memory(network, tmp_path):
    """8,192 equal screens: 0.8 GB, were they kept, and more than one frame of a GIF can wait.

    A game of half the length: the whole 18 minutes take twice the time.
    """
    lazy = network.state_dict() | {"actor.weight": torch.zeros(4, 512)}
    torch.save(lazy | {"actor.bias": torch.tensor([99.0, 0, 0, 0])}, tmp_path / "lazy.pth")
    flags = ["--weights", tmp_path / "lazy.pth", "--greedy", "--gif", "--runs-dir", "runs"]
    limit, peaks = "frames = 65_536 if", "import resource\n"
    for who in ("SELF", "CHILDREN"):
        peaks += f"print(resource.getrusage(resource.RUSAGE_{who}).ru_maxrss)\n"
    code = source("play_breakout") + peaks
    assert limit in code
    process = Process(code.replace(limit, "frames = 32_768 if"), *flags, cwd=tmp_path)
    assert process.wait(1500) == 0, process.stderr
    assert all(int(line) < 600_000 for line in process.stdout.splitlines()[-2:])  # KiB
    run_dir, result = only_run(tmp_path / "runs")
    assert result["scores"] == [0]
    with Image.open(run_dir / "film.gif") as gif:
        assert gif.n_frames == 32_768 / 4
    assert count_frames(run_dir / "film.mp4") == 32_768 / 4


def test_a_film_whose_end_is_missing_is_no_film(tmp_path, monkeypatch):
    """The disk got full, say, which ffmpeg does not tell: a GIF without its end still opens."""
    game = Game(make_env(BREAKOUT, whole_games=False), seed=53, whole=False)
    while game.score is None:
        game.step(FIRE)
    get_reader = imageio.get_reader

    def damage(part):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        return get_reader(part)

    monkeypatch.setattr(play_breakout.imageio, "get_reader", damage)
    with pytest.raises(OSError, match="no film: .*; everything else is in"):
        play_breakout.film(game, tmp_path / "film.gif", 1, codec="gif", output_params=["-f", "gif"])
    assert list(tmp_path.iterdir()) == []


# ---- weights -----------------------------------------------------------------------------------


def test_weights_of_every_kind_are_read(network, tmp_path):
    own, path = network.state_dict(), tmp_path / "w.pth"
    checkpoint = {"network": {name: weight + 1 for name, weight in own.items()}, "averaged": own}
    kinds = [own, {name: weight.clone().contiguous() for name, weight in own.items()},  # the book's
             {name: weight.half() for name, weight in own.items()},
             {"network": own, "optimizer": {}, "args": {}, "progress": {}},  # of version 0.1, 0.3
             {**checkpoint, "progress": {}, "envs": [], "env_id": BREAKOUT}]  # fmt: skip
    for number, content in enumerate([*kinds, own]):
        torch.save(content, path, _use_new_zipfile_serialization=number < len(kinds))
        loaded = load_network(path, make_env(BREAKOUT, whole_games=True)).state_dict()
        for name, weight in loaded.items():
            assert weight.dtype == torch.float32 and torch.allclose(weight, own[name], atol=1e-3)


def test_bad_weights_are_refused_and_their_fault_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, whole = torch.load(policy()), policy().read_bytes()
    damaged = "is missing, damaged, or holds no weights"
    faults = [
        (None, damaged), (b"", damaged), (whole[: len(whole) // 2], damaged), ([1, 2], damaged),
        (np.random.default_rng(0).bytes(5000), damaged), ({"fc.weight": Bomb()}, damaged),
        ({"fc.weight": torch.zeros(2)}, "fc.weight"), (dict.fromkeys(good, 0), "<class 'int'>"),
        ({name: good[name] for name in good if name != "actor.bias"}, "actor.bias"),
        ({**good, "conv.7.weight": torch.zeros(512, 100)}, "conv.7.weight: .*100"),
        (ActorCritic(6).state_dict(), "does not fit BreakoutNoFrameskip-v4: .*actor.bias: .*6.*4"),
        ({"averaged": good, "env_id": PONG}, "wants --env-id PongNoFrameskip-v4"),
        ({**good, "actor.bias": torch.full((4,), math.nan)}, "not all are finite"),
        ({name: weight * 1e20 for name, weight in good.items()}, "so large that they overflow"),
    ]  # fmt: skip
    for content, fault in faults:
        if isinstance(content, bytes):
            Path("bad.pth").write_bytes(content)
        elif content:
            torch.save(content, "bad.pth")
        with pytest.raises(ValueError, match=rf"\A--weights.*{fault}.*\Z"):
            play_breakout.play(Args(weights="bad.pth", max_attempts=1))
    assert not Path("bomb").exists()


@pytest.mark.parametrize(
    "flags",
    [{"random": True, "weights": "w.pth"}, {"random": True, "greedy": True},
     *[{"env_id": name} for name in ("", "NoSuchGame-v1", "nosuchmodule:Game-v1", "not an id",
                                     "CartPole-v1", "ALE/Breakout-v5", "BreakoutNoFrameskip-v0")]],
    ids=str,
)  # fmt: skip
def test_flags_that_contradict_each_other_and_other_games_are_refused(flags, tmp_path):
    with pytest.raises(ValueError, match=rf"\A--{[*flags][0].replace('_', '-')}.*\Z"):
        play_breakout.play(Args(runs_dir=tmp_path / "runs", **flags))
    assert list(tmp_path.iterdir()) == []


# ---- as a user runs it -------------------------------------------------------------------------


def test_without_a_policy_it_says_how_to_make_one(tmp_path):
    process = start("play_breakout", tmp_path, weights="missing.pth")
    assert process.wait() == 1 and process.stdout == ""
    assert re.fullmatch("error: --weights: .*`python a2c_breakout.py` makes.*\n", process.stderr)
    assert not (tmp_path / "runs").exists()


def test_a_first_look_at_the_game_shows_its_actions_and_its_screen(tmp_path):
    process = Process(source("play_breakout"), "--random", cwd=tmp_path)
    assert (process.wait(), process.stderr) == (0, "")
    run_dir, result = only_run(tmp_path / "runs")
    _, actions, *_, game, _, filming, _ = process.stdout.splitlines()
    assert actions == "actions: NOOP, FIRE, RIGHT, LEFT"
    assert [f"game 1: {score:g}" for score in result["scores"]] == [game]
    assert filming.startswith("filming game 1")
    first_screen = imageio.imread(run_dir / "first_screen.png")
    assert first_screen.shape == (210, 160, 3)
    assert len(np.unique(first_screen.reshape(-1, 3), axis=0)) > 6  # rows of bricks
    assert count_frames(run_dir / "film.mp4") > 100


@pytest.mark.parametrize("ctrl_c", [False, True], ids=["head", "tee"])
def test_a_reader_that_goes_away_costs_neither_result_nor_film(ctrl_c, tmp_path):
    """As head does after its lines, and tee at Ctrl-C, which ends play_breakout.py as well."""
    attempts = "100" if ctrl_c else "6"
    flags = ["--weights", policy(), "--runs-dir", tmp_path, "--max-attempts", attempts]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline(), process.stdout.readline()
    process.stdout.close()
    if ctrl_c:
        process.send_signal(signal.SIGINT)
    assert (process.stderr.read(), process.wait()) == ("", 130 if ctrl_c else 0)
    run_dir, result = only_run(tmp_path)
    assert len(result["scores"]) == 6 or ctrl_c
    assert count_frames(run_dir / "film.mp4") > 10
