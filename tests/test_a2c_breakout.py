"""Tests of a2c_breakout.py: the wrappers, the arithmetic, the processes, the command line. The emulator is real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import a2c_breakout as a2c

SCRIPT = Path(a2c.__file__)
GAMES = ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "QbertNoFrameskip-v4"]
TINY = ["--num-envs", "4", "--total-timesteps", "200"]  # 10 updates


def run(*flags, script=SCRIPT, timeout=120, **kwargs):
    """Runs the script as a user would, and returns the finished process."""
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)


def start(*flags):
    """Starts the script and returns once it trains."""
    command = [sys.executable, "-u", str(SCRIPT), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("finished timesteps"):
            return process
    raise AssertionError(process.stderr.read())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int], seconds: float = 20) -> bool:
    """Whether all these processes end within some seconds (a zombie has ended)."""

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.time() + seconds
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def one_line(process) -> str:
    """The only line on stderr of a run that refused its input."""
    assert process.returncode == 1, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ---- the game ----


@pytest.mark.parametrize("env_id", GAMES)
def test_frames_equal_those_of_gymnasium(env_id):
    """Bit for bit, with the same number of no-ops and the same actions, over the end of a game."""
    ours = a2c.Warp(a2c.MaxAndSkip(gym.make(env_id, obs_type="ram")))
    theirs = gym.wrappers.AtariPreprocessing(gym.make(env_id, obs_type="grayscale"), noop_max=0)
    rng = np.random.default_rng(0)
    for env in (ours, theirs):
        env.reset(seed=3)
    for _ in range(700):
        action = int(rng.integers(ours.action_space.n))
        mine, my_reward, *my_end, _ = ours.step(action)
        other, reward, *end, _ = theirs.step(action)
        assert np.array_equal(mine, other) and my_reward == reward and my_end == end
        if any(end):
            assert np.array_equal(ours.reset()[0], theirs.reset()[0])


def test_noop_reset_draws_1_to_30_noops():
    env = a2c.NoopReset(gym.make("BreakoutNoFrameskip-v4", obs_type="ram"))
    env.reset(seed=0)
    drawn = {env.reset()[1]["episode_frame_number"] for _ in range(300)}
    assert drawn == set(range(1, 31))


def test_noop_reset_gives_the_frames_of_gymnasium():
    ours = a2c.MaxAndSkip(a2c.NoopReset(gym.make("BreakoutNoFrameskip-v4", obs_type="ram")))
    theirs = gym.wrappers.AtariPreprocessing(gym.make("BreakoutNoFrameskip-v4", obs_type="grayscale"), noop_max=30)
    for seed in range(5):
        screen, _ = ours.reset(seed=seed)
        frame, _ = theirs.reset(seed=seed)
        assert np.array_equal(cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA), frame)


class Script(gym.Env):
    """A game that plays what it is given: a list of (reward, lives left, terminated, truncated), one per step."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(0, 255, (2, 2), np.uint8)

    def __init__(self, steps):
        self.script, self.resets, self.ale = list(steps), 0, self
        self.lives_left = 3

    def lives(self):
        return self.lives_left

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        self.lives_left = 3
        return np.zeros((2, 2), np.uint8), {}

    def step(self, action):
        reward, self.lives_left, terminated, truncated = self.script.pop(0)
        return np.ones((2, 2), np.uint8), reward, terminated, truncated, {}


def test_a_lost_life_ends_the_episode_but_not_the_game():
    game = Script([(1, 3, False, False), (2, 2, False, False), (4, 2, False, False), (8, 0, True, False)])
    env = a2c.EpisodicLife(game)
    env.reset()
    assert env.step(0)[2:4] == (False, False)
    _, _, terminated, truncated, info = env.step(0)
    assert (terminated, truncated, info["life"]) == (True, False, 3) and "game" not in info
    env.reset()  # goes on with one no-op, which earns 4
    assert game.resets == 1
    *_, terminated, truncated, info = env.step(0)
    assert terminated and info == {"life": 8 + 0, "game": (15, 4)}
    env.reset()
    assert game.resets == 2


def test_a_noop_that_ends_the_game_starts_a_new_one():
    game = Script([(1, 2, False, False), (2, 0, True, False), (5, 3, False, False)])
    env = a2c.EpisodicLife(game)
    env.reset()
    assert env.step(0)[2]
    _, info = env.reset()
    assert info["game"] == (3, 2) and game.resets == 2
    assert env.step(0)[2] is False


def test_the_frame_limit_is_a_real_end():
    game = Script([(1, 3, False, True), (1, 3, False, False)])
    env = a2c.EpisodicLife(game)
    env.reset()
    *_, terminated, truncated, info = env.step(0)
    assert (terminated, truncated, info["game"]) == (False, True, (1, 1))
    env.reset()
    assert game.resets == 2


def test_zero_lives_before_the_end_are_no_end():
    env = a2c.EpisodicLife(Script([(0, 1, False, False), (0, 0, False, False), (0, 0, True, False)]))
    env.reset()
    assert [env.step(0)[2] for _ in range(3)] == [True, False, True]


def test_the_stack_keeps_four_frames_and_forgets_them_at_a_reset():
    class Counter(gym.Env):
        observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
        count = 0

        def reset(self, **kwargs):
            self.count += 100
            return np.full((84, 84), self.count, np.uint8), {}

        def step(self, action):
            self.count += 1
            return np.full((84, 84), self.count, np.uint8), 0.0, False, False, {}

    env = a2c.FrameStack(Counter())
    env.reset()
    for _ in range(5):
        stack = env.step(0)[0]
    assert stack.shape == (84, 84, 4) and stack.dtype == np.uint8
    assert stack[7, 9].tolist() == [102, 103, 104, 105]
    assert env.reset()[0][0, 0].tolist() == [0, 0, 0, 205]


def test_an_environment_goes_on_from_its_saved_state(tmp_path):
    """Through the file format of a checkpoint, into a fresh emulator, over many lives and games."""
    env, rng = a2c.make_env("BreakoutNoFrameskip-v4"), np.random.default_rng(0)
    env.reset(seed=5)
    actions = rng.integers(4, size=900).tolist()

    def play(env, actions):
        seen = []
        for action in actions:
            frames, reward, terminated, truncated, info = env.step(action)
            seen.append((frames.tobytes(), reward, terminated, info.get("game")))
            if terminated or truncated:
                seen.append((env.reset()[0].tobytes(),))
        return seen

    play(env, actions[:333])
    a2c.save(tmp_path / "state.pth", env.state_dict())
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    copy = a2c.make_env("BreakoutNoFrameskip-v4")
    copy.reset(seed=77)
    copy.load_state_dict(state)
    assert play(env, actions[333:]) == play(copy, actions[333:])


# ---- the arithmetic ----


def test_returns_equal_a_brute_force_sum_and_stop_at_the_end_of_an_episode():
    T, N, gamma = 7, 5, 0.9
    torch.manual_seed(0)
    rewards, last_values = torch.randn(T, N), torch.randn(N)
    masks = (torch.rand(T, N) > 0.3).float()
    returns = a2c.compute_returns(rewards, masks, last_values, gamma)
    for n in range(N):
        for t in range(T):
            total, discount = 0.0, 1.0
            for k in range(t, T):
                total += discount * rewards[k, n].item()
                discount *= gamma
                if masks[k, n] == 0:
                    break
            else:
                total += discount * last_values[n].item()
            assert returns[t, n].item() == pytest.approx(total, abs=1e-5)


def test_actions_are_drawn_with_the_probabilities_of_the_policy():
    probs, n = torch.tensor([0.05, 0.15, 0.3, 0.5]), 40_000
    generator = torch.Generator().manual_seed(0)
    actions = a2c.act(lambda _: (None, probs.log().expand(n, 4)), None, generator)
    counts = torch.bincount(actions, minlength=4)
    assert ((counts - n * probs) ** 2 / (n * probs)).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_loss_and_gradient_equal_a_float64_recomputation():
    torch.manual_seed(0)
    network = a2c.ActorCritic(4)
    torch.nn.init.normal_(network.actor.weight, std=0.1)
    observations = torch.randint(0, 256, (6, 84, 84, 4), dtype=torch.uint8)
    actions, returns = torch.tensor([0, 3, 1, 1, 2, 0]), torch.randn(6) * 3
    value_loss, policy_loss, entropy = a2c.compute_losses(network, observations, actions, returns)
    mine = 0.5 * value_loss + policy_loss - 0.01 * entropy
    mine.backward()

    exact = a2c.ActorCritic(4).double()
    exact.load_state_dict(network.state_dict())
    features = exact.conv(observations.permute(0, 3, 1, 2).double() / 255)
    values, probs = exact.critic(features)[:, 0], exact.actor(features).softmax(-1)
    loss = 0.0
    for i in range(6):
        advantage = returns[i].double() - values[i]
        loss = loss + 0.5 * advantage**2 / 6 - advantage.detach() * probs[i, actions[i]].log() / 6
        loss = loss + 0.01 * (probs[i] * probs[i].log()).sum() / 6
    loss.backward()
    assert mine.item() == pytest.approx(loss.item(), rel=1e-4)
    for one, other in zip(network.parameters(), exact.parameters()):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-9


def test_bfloat16_keeps_heads_and_weights_in_float32():
    torch.manual_seed(0)
    network, reduced = a2c.ActorCritic(4), a2c.ActorCritic(4, bf16=True)
    reduced.load_state_dict(network.state_dict())
    observations = torch.randint(0, 256, (2, 84, 84, 4), dtype=torch.uint8)
    (values, logits), (values16, logits16) = network(observations), reduced(observations)
    assert values16.dtype == logits16.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in reduced.parameters())
    assert 0 < (values - values16).abs().max() < 0.05
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as around a rollout
        for _ in range(2):
            assert all(map(torch.equal, reduced(observations), (values16, logits16)))


def test_initialisation_is_the_books():
    torch.manual_seed(0)
    network = a2c.ActorCritic(4)
    for layer, gain in [(network.conv[0], 2**0.5), (network.conv[7], 2**0.5), (network.critic, 1), (network.actor, 0.01)]:
        weight = layer.weight.flatten(1)
        assert torch.allclose(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-5)
        assert not layer.bias.any()


def test_weights_with_the_books_names_and_shapes_load():
    shapes = {"conv.0": (32, 4, 8, 8), "conv.2": (64, 32, 4, 4), "conv.4": (64, 64, 3, 3), "conv.7": (512, 3136),
              "critic": (1, 512), "actor": (4, 512)}  # fmt: skip
    book = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    book |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    network = a2c.ActorCritic(4)
    network.load_state_dict(book, strict=True)
    assert torch.equal(network.actor.bias, book["actor.bias"])


# ---- the processes ----


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_fill_the_rollout_with_transitions_of_the_game(method, monkeypatch):
    """What the workers write equals what the same environments give here, one by one: no reset step is a transition."""
    monkeypatch.setattr(a2c, "START_METHOD", method)
    T, N = 120, 3
    storage = a2c.RolloutStorage(T, N)
    torch.manual_seed(0)
    storage.actions[:] = torch.randint(0, 4, (T, N))
    with a2c.ParallelEnvs(storage, "BreakoutNoFrameskip-v4", 11, num_workers=2) as envs:
        envs.wait()
        pids = [process.pid for process, _ in envs.workers]
        games = [(t, *game) for t in range(T) for game in envs.step(t)]
    assert gone(pids)
    expected_games = []
    for i in range(N):
        env = a2c.make_env("BreakoutNoFrameskip-v4")
        frames, _ = env.reset(seed=11 + i)
        for t in range(T):
            assert np.array_equal(storage.observations[t, i], frames)
            frames, reward, terminated, truncated, info = env.step(storage.actions[t, i].item())
            assert storage.rewards[t, i] == reward and storage.masks[t, i] == (not terminated)
            if terminated:
                assert storage.life_returns[i] == info["life"] or not storage.masks[t + 1 :, i].all()
                frames, reset_info = env.reset()
                info |= reset_info
            if "game" in info:
                expected_games.append((t, i, *info["game"]))
        assert np.array_equal(storage.observations[T, i], frames)
    assert not storage.masks.all() and storage.rewards.any()
    assert sorted(games) == sorted(expected_games)


def test_a_dead_worker_is_reported():
    storage = a2c.RolloutStorage(1, 2)
    with a2c.ParallelEnvs(storage, "BreakoutNoFrameskip-v4", 0, num_workers=2) as envs:
        envs.wait()
        os.kill(envs.workers[1][0].pid, signal.SIGKILL)
        with pytest.raises(a2c.UserError, match=r"died \(exit code -9\)"):
            for _ in range(100):
                envs.step(0)
        assert gone([process.pid for process, _ in envs.workers])


# ---- the script ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run, started from a copy of the script that lies alone in a folder."""
    folder = tmp_path_factory.mktemp("alone")
    script = shutil.copy(SCRIPT, folder)
    process = run(*TINY, "--save-every", 5, "--log-every", 5, script=script, cwd=folder)
    assert process.returncode == 0, process.stderr
    (run_dir,) = (folder / "runs").iterdir()
    assert process.stdout.splitlines()[-1] == f"Everything is in {run_dir.relative_to(folder)}"
    assert process.stdout.count("finished timesteps") == 2 and "ActorCritic(" in process.stdout
    assert process.stderr == ""  # no banner, and no bar in a file
    return run_dir


def test_a_run_leaves_all_its_files(finished):
    names = {file.name.split(".")[0] + file.suffix for file in finished.iterdir() if "tfevents" not in file.name}
    assert names == {"args.json", "checkpoint.pth", "result.json", "weight_0.pth", "weight_5.pth", "weight_10.pth",
                     "weight_end.pth"}  # fmt: skip
    result = json.loads((finished / "result.json").read_text())
    assert result["timesteps"] == 200 and result["seed"] == 1 and result["steps_per_second"] > 0
    assert {"seconds", "versions", "mean_return", "games"} <= result.keys()
    weights = torch.load(finished / "weight_end.pth", weights_only=True)
    a2c.ActorCritic(4).load_state_dict(weights)
    before = torch.load(finished / "weight_0.pth", weights_only=True)
    assert not torch.equal(weights["actor.weight"], before["actor.weight"])


def test_a_run_logs_its_curves(finished):
    events = EventAccumulator(str(finished)).Reload()
    for tag in ("charts/SPS", "charts/learning_rate", "losses/value_loss", "losses/policy_loss", "losses/entropy"):
        assert [event.step for event in events.Scalars(tag)] == [20, 120], tag
    assert events.Scalars("charts/learning_rate")[0].value == pytest.approx(7e-4)
    assert events.Scalars("losses/entropy")[0].value == pytest.approx(np.log(4), abs=0.01)


def train(tmp_path, **changes):
    """Trains in this process and returns the final weights."""
    args = a2c.Args(**{"num_envs": 4, "total_timesteps": 200, "runs_dir": tmp_path} | changes)
    a2c.train(args)
    run_dir = args.resume or max(tmp_path.iterdir())
    return torch.load(run_dir / "weight_end.pth", weights_only=True)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_weights(tmp_path, finished):
    weights = train(tmp_path)
    assert same(weights, torch.load(finished / "weight_end.pth", weights_only=True))
    assert not same(weights, train(tmp_path, seed=2))


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_the_gradient_is_that_of_the_whole_loss_clipped(tmp_path, monkeypatch, max_grad_norm):
    """What reaches RMSprop, against the gradient of the three losses put together here."""
    expected, steps, losses, rmsprops_step = [], [], a2c.compute_losses, torch.optim.RMSprop.step

    def spied_losses(network, *batch):
        value_loss, policy_loss, entropy = losses(network, *batch)
        loss = 0.5 * value_loss + policy_loss - 0.01 * entropy
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        expected.append([gradient * min(1.0, max_grad_norm / norm) for gradient in gradients])
        return value_loss, policy_loss, entropy

    def spied_step(optimizer):
        steps.append([parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]])
        return rmsprops_step(optimizer)

    monkeypatch.setattr(a2c, "compute_losses", spied_losses)
    monkeypatch.setattr(torch.optim.RMSprop, "step", spied_step)
    train(tmp_path, max_grad_norm=max_grad_norm)
    assert steps
    for ours, theirs in zip(steps, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() <= 1e-3 * other.norm()


def test_annealing_lowers_the_learning_rate_to_its_last_share(tmp_path):
    train(tmp_path, anneal_lr=True, log_every=1)
    events = EventAccumulator(str(max(tmp_path.iterdir()))).Reload()
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([7e-4 * (10 - update) / 10 for update in range(10)])


def test_annealing_can_be_kept_to_the_end(tmp_path):
    args = a2c.Args(total_timesteps=800, anneal_lr=True, anneal_timesteps=320)
    shares = [a2c.learning_rate(args, update) / args.learning_rate for update in range(10)]
    assert shares == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    train(tmp_path, anneal_lr=True, anneal_timesteps=40, log_every=1)
    events = EventAccumulator(str(max(tmp_path.iterdir()))).Reload()
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([7e-4] * 9 + [3.5e-4])


def test_whole_games_are_logged_once_each(tmp_path):
    """Games of five lives, each at the timestep of its last decision."""
    result = a2c.train(a2c.Args(num_envs=4, total_timesteps=2800, runs_dir=tmp_path))
    events = EventAccumulator(str(max(tmp_path.iterdir()))).Reload()
    returns, lengths = events.Scalars("charts/episodic_return"), events.Scalars("charts/episodic_length")
    assert len(returns) == len(lengths) == result.games > 4
    steps = [event.step for event in returns]
    assert steps == sorted(set(steps)) and 0 < steps[0] and steps[-1] <= 2800
    assert result.mean_return == pytest.approx(np.mean([event.value for event in returns]))
    assert min(event.value for event in lengths) > 5 * 15  # five lives, not one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 0}, "--num-envs must be 1 or more, not 0"),
        ({"num_envs": -3}, "--num-envs"),
        ({"num_steps": 0}, "--num-steps"),
        ({"total_timesteps": 79}, "--total-timesteps"),
        ({"anneal_timesteps": 80}, "--anneal-timesteps must be 0 without --anneal-lr, not 80"),
        ({"anneal_lr": True, "anneal_timesteps": -1}, "--anneal-timesteps"),
        ({"anneal_lr": True, "anneal_timesteps": 10_000_001}, "--anneal-timesteps must be from 0 to --total-timesteps"),
        ({"gamma": float("nan")}, "--gamma must be from 0 to 1, not nan"),
        ({"gamma": 1.1}, "--gamma"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"seed": -1}, "--seed"),
        ({"log_every": 0}, "--log-every"),
        ({"env_id": "NoSuchGameNoFrameskip-v4"}, "doesn't exist"),
        ({"env_id": "CartPole-v1"}, "Atari game without frame skip"),
        ({"env_id": "ALE/Breakout-v5"}, "Atari game without frame skip"),
        ({"env_id": "Breakout-v4"}, "Atari game without frame skip"),
        ({"env_id": "BreakoutNoFrameskip-v0"}, "Atari game without frame skip"),
        ({"env_id": ""}, "--env-id"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(a2c.UserError, match=message) as error:
        a2c.train(a2c.Args(**{"runs_dir": tmp_path / "runs"} | changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_one_line_on_the_command_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot make" in one_line(run("--runs-dir", tmp_path / "file"))
    assert "--gamma" in one_line(run("--gamma", "nan", "--runs-dir", tmp_path / "runs"))
    assert run("--num-envs", "many").returncode == 2
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_saves_and_exits(tmp_path):
    process = start("--num-envs", 4, "--runs-dir", tmp_path)
    workers = children(process.pid)
    for pid in [process.pid, *workers]:
        os.kill(pid, signal.SIGINT)  # a terminal sends it to all of them
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == "" and gone(workers)
    (run_dir,) = tmp_path.iterdir()
    assert f"--resume {run_dir}" in output and output.splitlines()[-1] == f"Everything is in {run_dir}"
    assert {"checkpoint.pth", "weight_end.pth", "result.json"} <= {file.name for file in run_dir.iterdir()}


def test_a_killed_parent_leaves_nothing_running(tmp_path):
    process = start("--num-envs", 4, "--runs-dir", tmp_path)
    workers = children(process.pid)
    process.kill()
    assert process.communicate(timeout=30)[1] == ""
    assert workers and gone(workers)


def test_memory_does_not_grow(tmp_path):
    """In a process of its own, over a short while; benchmarks/breakout_memory.py looks at 200,000 timesteps."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import a2c_breakout as a2c
sizes = []
act = a2c.act
def counted(*arguments):
    sizes.append(int(open("/proc/self/statm").read().split()[1]))
    return act(*arguments)
a2c.act = counted
a2c.train(a2c.Args(num_envs=4, total_timesteps=3200, log_every=10, runs_dir=a2c.Path({str(tmp_path)!r})))
print(max(sizes[200:400]), max(sizes[-200:]))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200).stdout
    early, late = map(int, output.splitlines()[-1].split())
    assert late < 1.02 * early


def test_ctrl_c_while_it_starts_prints_no_traceback(tmp_path):
    for seconds in (0.5, 1.5):
        process = subprocess.Popen([sys.executable, SCRIPT, "--runs-dir", tmp_path / "runs"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=30)[1]
