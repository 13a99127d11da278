"""Tests of play_breakout.py: what is played, counted, filmed and refused."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import a2c_breakout
import play_breakout
from play_breakout import ActorCritic, Args, Game

SCRIPT = Path(play_breakout.__file__)
BREAKOUT = "BreakoutNoFrameskip-v4"
CPU = "cpu"
NOOP, FIRE, RIGHT, LEFT = range(4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Many threads are no faster on so few frames, and in each other's way on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network() -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(4)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weight_end.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def short_games(monkeypatch):
    """Lets the emulator end a game after 120 frames, 30 decisions."""
    make = gym.make

    def make_short(*args, **kwargs):
        return make(*args, **kwargs | {"max_num_frames_per_episode": 120})

    monkeypatch.setattr(play_breakout.gym, "make", make_short)


class Always(torch.nn.Module):
    """A policy with the same logits whatever it sees."""

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, frames):
        return torch.zeros(len(frames)), self.logits.expand(len(frames), -1)


def run_script(*flags, script=SCRIPT, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, script, *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def read_result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


# ---- the same game and the same network as in training -----------------------------------------


@pytest.mark.parametrize("game", ["Breakout", "Pong"])
def test_whole_games_are_those_of_training(game):
    ours = play_breakout.make_env(f"{game}NoFrameskip-v4", whole_games=True)
    training = a2c_breakout.make_env(f"{game}NoFrameskip-v4")
    assert np.array_equal(ours.reset(seed=5)[0], training.reset(seed=5)[0])
    lives_lost = 0
    for action in np.random.default_rng(0).integers(0, 4, 130):
        frames, reward, terminated, truncated, _ = ours.step(action)
        expected, *rest, _ = training.step(action)
        assert np.array_equal(frames, expected) and rest == [reward, terminated, truncated]
        if terminated or truncated:
            lives_lost += 1
            assert np.array_equal(ours.reset()[0], training.reset()[0])
    assert lives_lost > 0 or game == "Pong"


def test_network_is_that_of_training(network):
    training = a2c_breakout.ActorCritic(4)
    training.load_state_dict(network.state_dict())
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    for ours, theirs in zip(network(frames), training(frames)):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-6)


# ---- playing -----------------------------------------------------------------------------------


def test_an_attempt_is_one_life_with_fresh_bricks_and_no_noops():
    env = play_breakout.make_env(BREAKOUT, whole_games=False)
    first = Game(env, seed=3, whole=False)
    start = first.frames.copy()
    lives = []
    generator = np.random.default_rng(1)
    while first.score is None:
        first.step(int(generator.integers(4)))
        lives.append(env.unwrapped.ale.lives())
    assert lives[-1] == 4 and set(lives[:-1]) == {5}
    assert first.score == env.get_wrapper_attr("game")["score"]
    # The next attempt on the same emulator begins where every game begins, on its first frame.
    second = Game(env, seed=4, whole=False)
    assert np.array_equal(second.frames, start)
    assert env.unwrapped.ale.lives() == 5
    assert env.unwrapped.ale.getEpisodeFrameNumber() == 0
    assert (second.score, second.actions) == (None, [])


def test_a_whole_game_is_five_lives_and_its_score_their_sum(monkeypatch):
    env = play_breakout.make_env(BREAKOUT, whole_games=True)
    rewards = []  # of every frame, below all wrappers
    step = env.unwrapped.step

    def spy(action):
        answer = step(action)
        rewards.append(answer[1])
        return answer

    monkeypatch.setattr(env.unwrapped, "step", spy)
    game = Game(env, seed=0, whole=True)
    noops = len(rewards)
    assert 1 <= noops <= 30
    generator = np.random.default_rng(3)
    restarts = 0
    while game.score is None:
        lives = env.unwrapped.ale.lives()
        game.step(int(generator.integers(4)))
        if game.score is None and env.unwrapped.ale.lives() < lives:
            restarts += 1
            assert not game.frames[:3].any() and game.frames[3].any()
    assert env.unwrapped.ale.lives() == 0
    assert restarts == 4
    assert game.score == sum(rewards) > 0
    # Four frames a decision and for the no-op after each lost life; the last ones are cut short.
    assert 0 <= noops + 4 * (len(game.actions) + restarts) - len(rewards) < 4 * 5


@pytest.mark.parametrize("whole", [False, True])
def test_a_game_in_which_nothing_happens_ends(short_games, whole):
    args = Args(full_games=2) if whole else Args(max_attempts=2)
    games, _ = play_breakout.play_policy(args, Always(99.0, 0.0, 0.0, 0.0), CPU)
    assert [game.score for game in games] == [0, 0]
    for game in games:
        assert 20 <= len(game.actions) <= 30
        assert set(game.actions) == {NOOP}


def test_another_game_is_played(short_games):
    args = Args(env_id="PongNoFrameskip-v4", max_attempts=1)
    (game,), _ = play_breakout.play_policy(args, Always(*[0.0] * 6), CPU)
    assert game.env.spec.id == "PongNoFrameskip-v4" and set(game.actions) == set(range(6))


@pytest.mark.parametrize(("game", "frames"), [("Breakout", 65_536), ("Pong", 108_000)])
def test_no_game_goes_on_behind_its_frame_limit(game, frames):
    """From frame 65,536 on, Breakout's cartridge serves no ball any more."""
    env = play_breakout.make_game(f"{game}NoFrameskip-v4")
    assert env.unwrapped.ale.getInt("max_num_frames_per_episode") == frames


def test_a_game_of_breakout_is_cut_before_its_cartridge_dies():
    game = Game(play_breakout.make_env(BREAKOUT, True), seed=1, whole=True)
    while game.score is None:
        game.step(NOOP)
    assert game.env.unwrapped.ale.getEpisodeFrameNumber() == 65_536


def test_each_game_is_the_same_whatever_is_played_beside_it(network, short_games):
    def games(seed, count):
        args = Args(seed=seed, full_games=count)
        played, interrupted = play_breakout.play_policy(args, network, CPU)
        assert not interrupted
        return {game.seed: (game.score, game.actions) for game in played}

    together = games(20, 18)  # the last two begin when others are over
    assert list(together) == list(range(20, 38))
    for seed in (20, 27, 36, 37):
        assert games(seed, 1)[seed] == together[seed]
    assert len({tuple(actions) for _, actions in together.values()}) == 18


def test_actions_are_drawn_from_the_policy_or_are_the_likeliest():
    env = play_breakout.make_env(BREAKOUT, whole_games=False)
    games = [Game(env, seed, whole=False) for seed in range(2)]
    policy = Always(*np.log([0.1, 0.2, 0.3, 0.4]))
    drawn = np.array([play_breakout.act(policy, games, False, CPU) for _ in range(500)])
    frequencies = [(drawn == action).mean() for action in range(4)]
    assert np.allclose(frequencies, [0.1, 0.2, 0.3, 0.4], atol=0.06)
    assert (drawn[:, 0] != drawn[:, 1]).any()
    assert play_breakout.act(policy, games, True, CPU) == [LEFT, LEFT]


# ---- which games count -------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch, weights, tmp_path):
    """play() with games that end one by one, as (seed, score); None stands for Ctrl-C."""

    def play(script, **flags):
        play.started, ends = [], iter(script)

        class Scripted:
            def __init__(self, env, seed, whole):
                self.env, self.seed, self.score = env, seed, None
                play.started.append(seed)

            def step(self, action):
                pass

        def act(network, games, greedy, device):
            play.greedy = greedy
            play.side_by_side = max(len(games), getattr(play, "side_by_side", 0))
            end = next(ends)
            if end is None:
                raise KeyboardInterrupt
            for game in games:
                if game.seed == end[0]:
                    game.score = float(end[1])
            return [NOOP] * len(games)

        def film(game, run_dir, gif):
            play.filmed = game.seed

        monkeypatch.setattr(play_breakout, "Game", Scripted)
        monkeypatch.setattr(play_breakout, "act", act)
        monkeypatch.setattr(play_breakout, "replay", lambda game: game)
        monkeypatch.setattr(play_breakout, "film", film)
        try:
            return play_breakout.play(Args(weights=weights, runs_dir=tmp_path, seed=50, **flags))
        except KeyboardInterrupt:
            if None in script:
                raise
            pytest.fail("no game counted")  # a KeyboardInterrupt would end pytest itself

    return play


def test_attempts_go_on_until_one_is_over_the_target(scripted, capsys):
    result = scripted([(50, 3), (51, 5), (52, 9), (53, 7)], target_score=5, max_attempts=9)
    assert result["scores"] == [3, 5, 9]
    assert scripted.started == [50, 51, 52] and scripted.side_by_side == 1
    assert not scripted.greedy
    assert scripted.filmed == 52
    out = capsys.readouterr().out
    assert "attempt 2: 5\nattempt 3: 9\n" in out
    assert "best of 3 attempts: 9 (the target: over 5)" in out


def test_when_the_target_is_missed_the_best_is_filmed_all_the_same(scripted, capsys, tmp_path):
    result = scripted([(50, 3), (51, 5), (52, 5), (53, 1)], target_score=5, max_attempts=4)
    assert result["scores"] == [3, 5, 5, 1]
    assert (result["mean"], result["min"], result["max"]) == (3.5, 1, 5)
    assert result["std"] == pytest.approx(math.sqrt(2.75))
    assert scripted.filmed == 51
    assert "best of 4 attempts: 5 (the target: over 5)" in capsys.readouterr().out
    (run_dir,) = tmp_path.iterdir()
    assert run_dir.name.startswith("play_breakout__50__")
    saved = read_result(run_dir)
    assert saved["scores"] == result["scores"] and saved["std"] == result["std"]
    assert saved.keys() == {"seed", "seconds", "versions", "scores", "mean", "std", "min", "max"}
    assert saved["versions"].keys() == {"python", "ale_py", "torch", "gymnasium", "numpy", "cv2"}
    assert json.loads((run_dir / "args.json").read_text())["weights"].endswith("weight_end.pth")


def test_greedy_attempts_are_all_alike_so_one_is_played(scripted):
    scripted([(50, 3)], greedy=True)
    assert scripted.started == [50] and scripted.greedy


def test_full_games_count_in_the_order_of_their_seeds(scripted, capsys):
    result = scripted([(52, 1), (50, 8), (51, 4)], full_games=3, target_score=0)
    assert result["scores"] == [8, 4, 1]
    assert scripted.started == [50, 51, 52] and scripted.side_by_side == 3
    assert scripted.filmed == 50
    out = capsys.readouterr().out
    assert "scores: 3, mean 4.3, standard deviation 2.9, min 1, max 8" in out


def test_ctrl_c_keeps_the_games_before_the_first_that_was_not_over(scripted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        scripted([(51, 4), (53, 1), (50, 8), None], full_games=5)
    (run_dir,) = tmp_path.iterdir()
    assert read_result(run_dir)["scores"] == [8, 4]
    with pytest.raises(KeyboardInterrupt):
        scripted([(51, 4), None], full_games=2)  # nothing that counts


# ---- filming -----------------------------------------------------------------------------------


def test_film_shows_every_decision_of_the_best_attempt(weights, tmp_path, short_games):
    args = Args(weights=weights, max_attempts=3, gif=True, runs_dir=tmp_path)
    result = play_breakout.play(args)
    (run_dir,) = tmp_path.iterdir()

    # Play the best attempt once more, by hand and below all wrappers.
    network = play_breakout.load_network(weights, 4)
    games, _ = play_breakout.play_policy(args, network, CPU)
    assert [game.score for game in games] == result["scores"]
    best = games[result["scores"].index(result["max"])]
    game = gym.make(BREAKOUT, obs_type="rgb")
    game.reset(seed=best.seed)
    screens, over = [], False
    for action in best.actions:
        for _ in range(4):
            if not over:
                screen, _, terminated, truncated, _ = game.step(action)
                over = terminated or truncated
        screens.append(screen)
    assert len(screens) > 10 and screen.shape == (210, 160, 3)

    with imageio.get_reader(run_dir / "film.mp4") as film:
        assert film.get_meta_data()["size"] == (480, 630)
        assert film.get_meta_data()["fps"] == 15
        frames = [frame for frame in film]
    assert len(frames) == len(screens)
    for frame, screen in zip(frames, screens):
        large = screen.repeat(3, axis=0).repeat(3, axis=1).astype(int)
        assert frame.shape == (630, 480, 3)
        assert np.abs(frame - large).mean() < 1.2  # H.264 loses a little

    with Image.open(run_dir / "film.gif") as gif:
        assert gif.size == (160, 210) and gif.info["loop"] == 0  # it plays for ever
        shown = []
        for index in range(gif.n_frames):
            gif.seek(index)
            shown += [np.array(gif.convert("RGB"))] * (gif.info["duration"] // 70)
    assert np.array_equal(shown, screens)
    assert (run_dir / "film.gif").stat().st_size < 1000 * len(screens)


@pytest.mark.parametrize("size", [1_000, 12_000])  # ffmpeg dies at once, or at the very end
def test_a_film_that_cannot_be_written_is_no_film(tmp_path, size):
    limits = (size, size)
    played = subprocess.run(
        [sys.executable, SCRIPT, "--random", "--runs-dir", tmp_path], timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        capture_output=True, text=True,
    )  # fmt: skip
    assert played.returncode == 1 and "Traceback" not in played.stderr
    [run_dir] = tmp_path.iterdir()
    message = f"error: the film in {run_dir} could not be written: is the disk full?"
    assert played.stderr.splitlines()[-1] == message
    assert not (run_dir / "film.mp4").exists() and (run_dir / "result.json").exists()


def test_a_game_that_comes_out_differently_when_filmed_is_noticed(short_games):
    ((game,), _) = play_breakout.play_policy(Args(full_games=1), Always(0.0, 0.0, 0.0, 0.0), CPU)
    assert len(list(play_breakout.replay(game))) == len(game.actions)
    game.score += 1
    with pytest.raises(AssertionError):
        list(play_breakout.replay(game))


# ---- weights -----------------------------------------------------------------------------------


def half(state_dict):
    return {name: tensor.half() for name, tensor in state_dict.items()}


@pytest.mark.parametrize("kind", ["own", "book", "old format", "checkpoint", "float16"])
def test_weights_of_every_kind_are_read(kind, network, tmp_path):
    state_dict, path = network.state_dict(), tmp_path / "w.pth"
    if kind == "own":
        torch.save(state_dict, path)
    elif kind == "book":  # another module, with the same names and contiguous tensors
        copies = {name: tensor.clone().contiguous() for name, tensor in state_dict.items()}
        torch.save(OrderedDict(copies), path)
    elif kind == "old format":
        torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    elif kind == "checkpoint":
        torch.save({"averaged": state_dict, "progress": {"update": 3}}, path)
    elif kind == "float16":
        torch.save(half(state_dict), path)
    loaded = play_breakout.load_network(path, 4)
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    tolerance = 1e-3 if kind == "float16" else 0
    for ours, theirs in zip(loaded(frames), network(frames)):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, theirs, rtol=0, atol=tolerance)


def test_parameters_have_the_names_and_shapes_of_the_book():
    shapes = {name: tuple(tensor.shape) for name, tensor in ActorCritic(4).state_dict().items()}
    assert shapes == {
        "conv.0.weight": (32, 4, 8, 8),
        "conv.0.bias": (32,),
        "conv.2.weight": (64, 32, 4, 4),
        "conv.2.bias": (64,),
        "conv.4.weight": (64, 64, 3, 3),
        "conv.4.bias": (64,),
        "conv.7.weight": (512, 3136),
        "conv.7.bias": (512,),
        "critic.weight": (1, 512),
        "critic.bias": (1,),
        "actor.weight": (4, 512),
        "actor.bias": (4,),
    }


def test_the_pretrained_policy_is_the_default(tmp_path, short_games, pretend_a_gpu):
    assert play_breakout.PRETRAINED == SCRIPT.parent / "pretrained" / "a2c_breakout.pth"
    pretend_a_gpu(play_breakout)  # --device cpu does not ask
    play_breakout.play(Args(runs_dir=tmp_path, max_attempts=1, device="cpu"))
    (run_dir,) = tmp_path.iterdir()
    assert json.loads((run_dir / "args.json").read_text())["weights"] == str(Args().weights)


# ---- bad input ---------------------------------------------------------------------------------


class Bomb:
    """Pickled, it is a call of open(path, "w") for whoever unpickles it without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bad_weights(kind: str, good: Path, path: Path, marker: Path) -> str:
    """Puts something bad at path. Returns words that the message must hold."""
    state_dict = torch.load(good, weights_only=True)
    if kind == "missing":
        return "there is no policy"
    if kind == "folder":
        path.mkdir()
        return "there is no policy"
    if kind in ("empty", "truncated", "noise", "text"):
        content = good.read_bytes()
        noise = np.random.default_rng(0).bytes(5000)
        half_of_it = content[: len(content) // 2]
        contents = {"empty": b"", "truncated": half_of_it, "noise": noise, "text": b"Hi"}
        path.write_bytes(contents[kind])
        return "damaged"
    if kind in ("code", "bare code"):
        if kind == "code":
            torch.save({**state_dict, "conv.0.weight": Bomb(marker)}, path)
        else:
            path.write_bytes(pickle.dumps(Bomb(marker)))
        return "damaged"
    content, words = {
        "number": (3, "does not hold"),
        "list": ([1, 2], "does not hold"),
        "foreign": ({"fc.weight": torch.zeros(2, 2)}, "does not hold"),
        "one missing": ({k: v for k, v in state_dict.items() if k != "actor.bias"}, "not hold"),
        "no tensors": (dict.fromkeys(state_dict, 0), "does not hold"),
        "shape": ({**state_dict, "conv.7.weight": torch.zeros(512, 100)}, "does not hold"),
        "actions": (ActorCritic(6).state_dict(), "a network for 4 actions"),
        "not finite": ({**state_dict, "critic.bias": torch.tensor([math.nan])}, "finite"),
    }[kind]
    torch.save(content, path)
    return words


@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "empty", "truncated", "noise", "text", "code", "bare code", "number",
     "list", "foreign", "one missing", "no tensors", "shape", "actions", "not finite"],
)  # fmt: skip
def test_bad_weights_are_refused(kind, weights, tmp_path):
    path, marker, runs_dir = tmp_path / "bad.pth", tmp_path / "marker", tmp_path / "runs"
    words = bad_weights(kind, weights, path, marker)
    with pytest.raises((ValueError, OSError)) as error:
        play_breakout.play(Args(weights=path, runs_dir=runs_dir))
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not runs_dir.exists() and not marker.exists()


def test_weights_that_overflow_end_in_one_line(weights, tmp_path):
    huge = {name: tensor * 1e20 for name, tensor in torch.load(weights, weights_only=True).items()}
    torch.save(huge, tmp_path / "huge.pth")
    with pytest.raises(ValueError, match="overflow"):
        play_breakout.play(Args(weights=tmp_path / "huge.pth", full_games=1, runs_dir=tmp_path))


def test_files_damaged_anywhere_are_refused_or_read(tmp_path):
    path, generator = tmp_path / "w.pth", np.random.default_rng(0)
    torch.save({"conv.0.weight": torch.zeros(2)}, path)
    zipped = path.read_bytes()
    torch.save({"conv.0.weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    for content in [zipped, old] * 60:
        damaged = bytearray(content)
        for position in generator.integers(len(damaged), size=4):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged[: generator.integers(1, len(damaged) + 1)])
        with pytest.raises((ValueError, OSError)):  # too small for the network, where it is read
            play_breakout.load_network(path, 4)


@pytest.mark.parametrize(
    "flags",
    [
        {"seed": -1},
        {"seed": 2**31},
        {"target_score": math.nan},
        {"target_score": math.inf},
        {"max_attempts": 0},
        {"full_games": 0},
        {"full_games": -3},
        {"random": True, "weights": Path("w.pth")},
        {"random": True, "full_games": 3},
        {"random": True, "greedy": True},
        {"env_id": "NoSuchGame-v1"},
        {"env_id": "nosuchmodule:Game-v1"},
        {"env_id": "not an id"},
        {"env_id": ""},
        {"env_id": "CartPole-v1"},
        {"env_id": "ALE/Breakout-v5"},
        {"env_id": "BreakoutNoFrameskip-v0"},  # repeats actions by chance
        pytest.param(
            {"device": "cuda"},
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA"),
        ),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(flags, weights, tmp_path):
    flags = {"runs_dir": tmp_path / "runs"} | flags
    if "random" not in flags:
        flags["weights"] = weights
    flag = [name for name in flags if name not in ("runs_dir", "weights")][0].replace("_", "-")
    with pytest.raises(ValueError) as error:
        play_breakout.play(Args(**flags))
    assert f"--{flag}" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_runs_folder_is_refused(weights, tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(OSError, match="runs"):
        play_breakout.play(Args(weights=weights, runs_dir=tmp_path / "runs"))
    assert (tmp_path / "runs").read_text() == "mine"


# ---- as a user runs it -------------------------------------------------------------------------


def test_copied_alone_it_plays_at_random_and_asks_for_a_policy(tmp_path):
    script = shutil.copy(SCRIPT, tmp_path)
    without = run_script(script=script, cwd=tmp_path)
    assert without.returncode == 1 and without.stdout == ""
    (line,) = without.stderr.splitlines()
    assert line.startswith("error: ") and "python a2c_breakout.py" in line and "pretrained" in line
    assert not (tmp_path / "runs").exists()

    done = run_script("--random", script=script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    lines = done.stdout.splitlines()
    assert lines[0] == "observation space: Box(0, 255, (210, 160, 3), uint8)"
    assert lines[1] == "action space:      Discrete(4)"
    assert lines[2] == "action meanings:   ['NOOP', 'FIRE', 'RIGHT', 'LEFT']"
    assert lines[-1] == f"Everything is in {run_dir.relative_to(tmp_path)}; the film is film.mp4"
    assert "the lives that are left" in lines[3] and "FIRE serves" in lines[4]
    decisions, *_, score = lines[5].split()
    assert read_result(run_dir)["scores"] == [float(score)]

    files = {"args.json", "result.json", "first_screen.png", "film.mp4"}  # and no GIF
    assert {path.name for path in run_dir.iterdir()} == files
    first_screen = imageio.imread(run_dir / "first_screen.png")
    assert first_screen.shape == (210, 160, 3)
    assert len(np.unique(first_screen.reshape(-1, 3), axis=0)) > 6  # rows of bricks
    with imageio.get_reader(run_dir / "film.mp4") as film:
        assert film.get_meta_data()["size"] == (480, 630)
        assert sum(1 for _ in film) == int(decisions) <= 1000


def test_random_play_stops_after_1000_decisions(tmp_path, monkeypatch, capsys):
    filmed = []
    monkeypatch.setattr(play_breakout, "film", lambda screens, *_: filmed.extend(screens))
    # A game of Freeway lasts longer than that.
    play_breakout.play(Args(random=True, env_id="FreewayNoFrameskip-v4", runs_dir=tmp_path))
    assert len(filmed) == 1000
    assert "1000 random decisions scored 0" in capsys.readouterr().out


def test_random_play_of_one_seed_is_the_same_and_loses(tmp_path, monkeypatch):
    films = []
    monkeypatch.setattr(play_breakout, "film", lambda screens, *_: films.append(np.stack(screens)))
    for seed in (1, 1, 2):
        args = Args(random=True, env_id="PongNoFrameskip-v4", seed=seed, runs_dir=tmp_path)
        assert -21 <= play_breakout.play(args)["max"] < -10
    assert np.array_equal(films[0], films[1]) and not np.array_equal(films[0], films[2])


def test_bad_weights_give_one_line(tmp_path):
    (tmp_path / "noise.pth").write_bytes(np.random.default_rng(0).bytes(1000))
    done = run_script("--weights", "noise.pth", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: noise.pth cannot be read")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["noise.pth"]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_saves_what_there_is(weights, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", SCRIPT, "--weights", weights, "--runs-dir", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests that were started in the background ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("attempt 2:"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "Interrupted.\n"
    (run_dir,) = tmp_path.iterdir()
    assert out.splitlines()[-1] == f"Everything is in {run_dir}; the film is film.mp4"
    assert len(read_result(run_dir)["scores"]) >= 2
    with imageio.get_reader(run_dir / "film.mp4") as film:
        assert sum(1 for _ in film) > 10
