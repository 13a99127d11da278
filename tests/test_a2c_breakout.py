"""a2c_breakout.py: the wrappers, the arithmetic, the workers and a whole run; the game is real."""

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import a2c_breakout as a2c

SCRIPT = Path(a2c.__file__)
BREAKOUT = "BreakoutNoFrameskip-v4"
GAMES = [BREAKOUT, "PongNoFrameskip-v4", "QbertNoFrameskip-v4"]
TINY = ["--num-envs", "4", "--total-timesteps", "200"]  # 10 updates


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def two_workers():
    """Two threads for each test, and no training that goes on behind one that has failed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    while started:
        process = started.pop()
        process.terminate()  # which does nothing once it has ended
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def run(*flags, script=SCRIPT, timeout=120, **kwargs):
    """Runs the script as a user would, with two workers, and returns the finished process."""
    command = [sys.executable, str(script), *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    kwargs = {"capture_output": True, "text": True, "timeout": timeout, "env": env} | kwargs
    return subprocess.run(command, **kwargs)


def start(*flags, until="finished timesteps"):
    """Starts the script and returns once it has printed a line: it trains then."""
    command = [sys.executable, "-u", str(SCRIPT), *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, env=env)
    started.append(process)
    for line in process.stdout:
        if until in line:
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


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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
    env = a2c.NoopReset(gym.make(BREAKOUT, obs_type="ram"))
    env.reset(seed=0)
    drawn = {env.reset()[1]["episode_frame_number"] for _ in range(300)}
    assert drawn == set(range(1, 31))


def test_noop_reset_gives_the_frames_of_gymnasium():
    ours = a2c.MaxAndSkip(a2c.NoopReset(gym.make(BREAKOUT, obs_type="ram")))
    game = gym.make(BREAKOUT, obs_type="grayscale")
    theirs = gym.wrappers.AtariPreprocessing(game, noop_max=30)
    for seed in range(5):
        screen, _ = ours.reset(seed=seed)
        frame, _ = theirs.reset(seed=seed)
        assert np.array_equal(cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA), frame)


def test_no_game_of_breakout_goes_on_behind_the_frame_where_the_cartridge_dies():
    env = a2c.make_env(BREAKOUT)
    env.reset(seed=0)
    ale = env.unwrapped.ale
    while ale.getEpisodeFrameNumber() < 65_500:
        ale.act(0)  # nobody serves: the game stands still
    for _ in range(20):
        _, _, terminated, truncated, info = env.step(0)
        if truncated:
            break
    assert truncated and not terminated and ale.getEpisodeFrameNumber() == 65_536
    assert info["game"] == (0, 9)
    assert a2c.make_env(GAMES[1]).unwrapped.ale.getInt("max_num_frames_per_episode") == 108_000


class Script(gym.Env):
    """Plays what it is given: (reward, lives left, terminated, truncated) for each step."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(0, 255, (2, 2), np.uint8)

    def __init__(self, *steps):
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
    game = Script((1, 3, False, False), (2, 2, False, False), (4, 2, False, False),
                  (8, 0, True, False))  # fmt: skip
    env = a2c.EpisodicLife(game)
    env.reset()
    assert env.step(0)[2:4] == (False, False)
    assert env.step(0)[2:] == (True, False, {})
    env.reset()  # goes on with one no-op, which earns 4
    assert game.resets == 1
    assert env.step(0)[2:] == (True, False, {"game": (15, 4)})
    env.reset()
    assert game.resets == 2


def test_a_noop_that_ends_the_game_starts_a_new_one():
    game = Script((1, 2, False, False), (2, 0, True, False), (5, 3, False, False))
    env = a2c.EpisodicLife(game)
    env.reset()
    assert env.step(0)[2]
    _, info = env.reset()
    assert info["game"] == (3, 2) and game.resets == 2
    assert env.step(0)[2] is False


def test_the_frame_limit_is_a_real_end():
    game = Script((1, 3, False, True), (1, 3, False, False))
    env = a2c.EpisodicLife(game)
    env.reset()
    assert env.step(0)[2:] == (False, True, {"game": (1, 1)})
    env.reset()
    assert game.resets == 2


def test_zero_lives_before_the_end_are_no_end():
    env = a2c.EpisodicLife(Script((0, 1, False, False), (0, 0, False, False), (0, 0, True, False)))
    env.reset()
    assert [env.step(0)[2] for _ in range(3)] == [True, False, True]


@pytest.mark.parametrize(("max_idle_steps", "ends"), [(3, [6, 9]), (4, [7]), (0, [])])
def test_an_idle_game_ends_after_so_many_decisions_without_a_reward(max_idle_steps, ends):
    """Counted over the loss of a life; a reward sets the count back."""
    steps = [(0, 3), (0, 3), (1, 3), (0, 3), (0, 2), (0, 2), *[(0, 3)] * 4]
    game = Script(*((reward, lives, False, False) for reward, lives in steps))
    env, ended = a2c.EpisodicLife(game, max_idle_steps), []
    env.reset()
    for number in range(1, 11):
        _, _, terminated, truncated, info = env.step(0)
        assert truncated == ("game" in info)
        if truncated:
            ended.append(number)
            env.reset()
        assert terminated == (number == 5)  # the life; the agent plays on without a reset
    assert ended == ends and game.resets == 1 + len(ends)


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
    assert stack.shape == (4, 84, 84) and stack.dtype == np.uint8
    assert stack[:, 7, 9].tolist() == [102, 103, 104, 105]
    assert env.reset()[0][:, 0, 0].tolist() == [0, 0, 0, 205]


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
    env = SimpleNamespace(unwrapped=SimpleNamespace(np_random=np.random.default_rng(0)))
    worker = SimpleNamespace(network=lambda _: (None, probs.log().expand(n, 4)), envs=[env] * n)
    counts = np.bincount(a2c.Worker.act(worker, None), minlength=4)
    expected = n * probs.numpy()
    # chi-square, 3 degrees of freedom, p = 0.001
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_loss_and_gradient_equal_a_float64_recomputation():
    torch.manual_seed(0)
    network = a2c.ActorCritic(4)
    torch.nn.init.normal_(network.actor.weight, std=0.1)
    observations = torch.randint(0, 256, (6, 4, 84, 84), dtype=torch.uint8)
    actions, returns = torch.tensor([0, 3, 1, 1, 2, 0]), torch.randn(6) * 3
    value_loss, policy_loss, entropy = a2c.compute_losses(network, observations, actions, returns)
    mine = 0.5 * value_loss + policy_loss - 0.01 * entropy
    mine.backward()

    exact = a2c.ActorCritic(4).double()
    exact.load_state_dict(network.state_dict())
    features = exact.conv(observations.double() / 255)
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
    observations = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    (values, _), (values16, logits16) = network(observations), reduced(observations)
    assert values16.dtype == logits16.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in reduced.parameters())
    assert 0 < (values - values16).abs().max() < 0.05


def test_initialisation_is_the_books():
    torch.manual_seed(0)
    network = a2c.ActorCritic(4)
    gains = [(network.conv[0], 2**0.5), (network.conv[2], 2**0.5), (network.conv[4], 2**0.5),
             (network.conv[7], 2**0.5), (network.critic, 1), (network.actor, 0.01)]  # fmt: skip
    for layer, gain in gains:
        weight = layer.weight.flatten(1)
        assert torch.allclose(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-5)
        assert not layer.bias.any()


def test_weights_with_the_books_names_and_shapes_load():
    shapes = {"conv.0": (32, 4, 8, 8), "conv.2": (64, 32, 4, 4), "conv.4": (64, 64, 3, 3),
              "conv.7": (512, 3136), "critic": (1, 512), "actor": (4, 512)}  # fmt: skip
    book = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    book |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    network = a2c.ActorCritic(4)
    network.load_state_dict(book, strict=True)
    assert torch.equal(network.actor.bias, book["actor.bias"])


# ---- the workers ----


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_fill_the_rollout_with_transitions_of_the_game(method, monkeypatch):
    """Each environment played again here, alone: same draws, and no reset step is a transition."""
    context = torch.multiprocessing.get_context(method)
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: context)
    T, N = 60, 3
    args = a2c.Args(seed=11, num_envs=N, num_steps=T, max_idle_steps=40)
    storage = a2c.RolloutStorage(T, N)
    torch.manual_seed(0)
    network, seen, games = a2c.ActorCritic(4).share_memory(), [], []
    with a2c.start_workers(args, network, storage) as tell:
        pids = [process.pid for process in multiprocessing.active_children()]
        for update in range(2):
            games += tell("rollout", update)
            seen.append([array.clone() for array in vars(storage).values()])
    assert gone(pids) and len(pids) == 2
    _, actions, rewards, masks = (torch.cat(parts) for parts in zip(*seen))
    expected_games, ends = [], set()
    seeds = np.random.SeedSequence(11).generate_state(N)
    for i in range(N):
        env = a2c.make_env(BREAKOUT, max_idle_steps=40)
        frames, _ = env.reset(seed=int(seeds[i]))
        for t in range(2 * T):
            assert np.array_equal(seen[t // T][0][t % T, i], frames)
            with torch.no_grad():
                logits = network(torch.from_numpy(frames)[None])[1][0].numpy()
            assert actions[t, i] == (logits + env.unwrapped.np_random.gumbel(size=4)).argmax()
            frames, reward, terminated, truncated, info = env.step(actions[t, i].item())
            assert rewards[t, i] == reward and masks[t, i] == (not (terminated or truncated))
            ends.update([(terminated, truncated)])
            if terminated or truncated:
                frames, reset_info = env.reset()
                info |= reset_info
            if "game" in info:
                expected_games.append((t * N + i + 1, *info["game"]))
            if t % T == T - 1:
                assert np.array_equal(seen[t // T][0][T, i], frames)
    assert ends == {(False, False), (True, False), (False, True)}  # lives and cuts
    assert rewards.any() and sorted(games) == sorted(expected_games) != []


def test_a_dead_worker_is_reported():
    args, storage = a2c.Args(num_envs=2), a2c.RolloutStorage(1, 2)
    with a2c.start_workers(args, a2c.ActorCritic(4), storage) as tell:
        pids = [process.pid for process in multiprocessing.active_children()]
        os.kill(pids[-1], signal.SIGKILL)
        with pytest.raises(ValueError, match=f"worker process {pids[-1]} died"):
            for update in range(100):
                tell("rollout", update)
    assert gone(pids)


def test_no_two_environments_of_neighbouring_runs_share_a_seed(monkeypatch):
    seeds = []

    class Env:
        def reset(self, seed):
            seeds.append(seed)
            return np.zeros((4, 84, 84), np.uint8), {}

    monkeypatch.setattr(a2c, "make_env", lambda *_: Env())
    storage = a2c.RolloutStorage(1, 16)
    for run_seed in (1, 2, 3):
        for indices in (range(0, 5), range(5, 16)):
            a2c.Worker(a2c.Args(seed=run_seed), None, storage, indices)
    assert len(seeds) == len(set(seeds)) == 48


# ---- a run ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run, started from a copy of the script that lies alone in a folder."""
    folder = tmp_path_factory.mktemp("alone")
    script = shutil.copy(SCRIPT, folder)
    process = run(*TINY, "--save-every", 5, "--log-every", 5, script=script, cwd=folder)
    assert process.returncode == 0, process.stderr
    (run_dir,) = (folder / "runs").iterdir()
    last = f"200 timesteps are done. Everything is in {run_dir.relative_to(folder)}"
    assert process.stdout.splitlines()[-1] == last
    assert process.stdout.count("finished timesteps") == 2 and "ActorCritic(" in process.stdout
    assert process.stderr == ""  # no banner
    return run_dir


def test_a_run_leaves_all_its_files(finished):
    names = {file.name for file in finished.iterdir() if "tfevents" not in file.name}
    assert names == {"args.json", "checkpoint.pth", "lock", "result.json", "weight_0.pth",
                     "weight_5.pth", "weight_10.pth", "weight_end.pth"}  # fmt: skip
    result = json.loads((finished / "result.json").read_text())
    assert result["timesteps"] == 200 and result["seed"] == 1 and result["steps_per_second"] > 0
    assert {"seconds", "versions", "mean_return", "games"} <= result.keys()
    weights = torch.load(finished / "weight_end.pth", weights_only=True)
    a2c.ActorCritic(4).load_state_dict(weights)
    before = torch.load(finished / "weight_0.pth", weights_only=True)
    assert not torch.equal(weights["actor.weight"], before["actor.weight"])


def test_a_run_logs_its_curves(finished):
    losses = [f"losses/{name}" for name in ("value_loss", "policy_loss", "entropy")]
    for tag in ["charts/SPS", "charts/learning_rate", *losses]:
        assert [step for step, _ in points(finished, tag)] == [20, 120], tag
    rates = [rate for _, rate in points(finished, "charts/learning_rate")]
    assert rates == pytest.approx([7e-4, 3.5e-4])
    assert points(finished, "losses/entropy")[0][1] == pytest.approx(np.log(4), abs=0.01)


def train(tmp_path, **changes):
    """Trains in this process and returns the final weights."""
    args = a2c.Args(**{"num_envs": 4, "total_timesteps": 200, "runs_dir": tmp_path} | changes)
    a2c.train(args)
    run_dir = args.resume or max(tmp_path.iterdir())
    return torch.load(run_dir / "weight_end.pth", weights_only=True)


def test_the_same_seed_and_precision_give_the_same_weights(tmp_path, finished):
    weights = train(tmp_path)
    assert same(weights, torch.load(finished / "weight_end.pth", weights_only=True))
    assert not same(weights, train(tmp_path / "bf16", bf16=True))
    assert not same(weights, train(tmp_path / "seed", seed=2))
    (run_dir,) = (tmp_path / "seed").iterdir()
    one, two = (torch.load(run / "weight_0.pth", weights_only=True) for run in (finished, run_dir))
    assert not same(one, two)


def test_on_a_gpu_the_workers_get_every_update(tmp_path, pretend_a_gpu):
    """By the same lines; but what asks for CUDA here gets the CPU, which every machine has."""
    weights = train(tmp_path / "cpu", average_decay=0)
    cpu = torch.device("cpu")
    pretend_a_gpu(a2c, device=lambda _: cpu)
    assert same(weights, train(tmp_path / "gpu", average_decay=0))


def test_the_line_of_output(tmp_path, capsys):
    args = a2c.Args(num_envs=4, total_timesteps=3_700_000, resume=tmp_path / "run")
    run = a2c.Run(args)
    run.progress["update"], run.start = 5000, time.perf_counter() - 100
    run.ended_games = [(number, number, 5) for number in range(150)]  # timestep, score, length
    run.writer = SimpleNamespace(add_scalar=lambda *_: None)
    run.log({}, 0)
    assert capsys.readouterr().out == (
        "finished timesteps 100000, last 100 games: mean/median 99.5/99.5, min/max 50/149, "
        "1000 steps/s, 1.0 h left\n"
    )


@pytest.mark.parametrize(("max_grad_norm", "average_decay"), [(1e-3, 0.6), (1e3, 0.0)])
def test_an_update_is_the_clipped_gradient_of_the_whole_loss_and_every_tenth_is_averaged(
    tmp_path, monkeypatch, max_grad_norm, average_decay
):
    """What reaches the loss and RMSprop, and what is kept, against the same recomputed here."""
    expected, steps, weights, seen = [], [], [], []
    storage = a2c.RolloutStorage(4, 4)
    losses, rmsprops_step = a2c.compute_losses, torch.optim.RMSprop.step

    def spied_losses(network, *batch):
        assert all(weight.is_shared() for weight in network.parameters())  # the workers' too
        with torch.no_grad():
            last_values, _ = network(storage.observations[-1])
        returns = a2c.compute_returns(storage.rewards.sign(), storage.masks, last_values, 0.9)
        rollout = (storage.observations[:-1], storage.actions, returns)
        assert all(torch.equal(a, b.flatten(0, 1)) for a, b in zip(batch, rollout, strict=True))
        value_loss, policy_loss, entropy = losses(network, *batch)
        seen.append((value_loss.item(), policy_loss.item()))
        loss = 0.5 * value_loss + policy_loss - 0.02 * entropy
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        expected.append([gradient * min(1.0, max_grad_norm / norm) for gradient in gradients])
        return value_loss, policy_loss, entropy

    def spied_step(optimizer):
        assert (optimizer.defaults["alpha"], optimizer.defaults["eps"]) == (0.9, 1e-3)
        parameters = optimizer.param_groups[0]["params"]
        steps.append([parameter.grad.clone() for parameter in parameters])
        rmsprops_step(optimizer)
        weights.append([parameter.detach().clone() for parameter in parameters])

    monkeypatch.setattr(a2c, "RolloutStorage", lambda *sizes: storage if sizes == (4, 4) else None)
    monkeypatch.setattr(a2c, "compute_losses", spied_losses)
    monkeypatch.setattr(torch.optim.RMSprop, "step", spied_step)
    changes = {"max_grad_norm": max_grad_norm, "average_decay": average_decay, "gamma": 0.9}
    changes |= {"rmsprop_alpha": 0.9, "rmsprop_eps": 1e-3, "num_steps": 4}
    kept = train(tmp_path, total_timesteps=352, value_loss_coef=0.5, entropy_coef=0.02, **changes)
    assert len(steps) == 22
    for ours, theirs in zip(steps, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() <= 1e-3 * other.norm()
    (run_dir,) = tmp_path.iterdir()
    logged = [points(run_dir, f"losses/{name}")[0][1] for name in ("value_loss", "policy_loss")]
    assert logged == pytest.approx(seen[0])
    mean = torch.load(run_dir / "weight_0.pth", weights_only=True).values()
    for update in (0, 10, 20):
        mean = [0.6 * old + 0.4 * new for old, new in zip(mean, weights[update], strict=True)]
    wanted = mean if average_decay else weights[-1]
    assert all(map(torch.allclose, kept.values(), wanted))
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    assert all(map(torch.equal, checkpoint["network"].values(), weights[-1]))
    assert not average_decay or same(checkpoint["averaged"], kept)


@pytest.mark.parametrize(("clip_rewards", "seen_by_loss"), [(True, {0, -1}), (False, {0, -7})])
def test_the_loss_sees_the_sign_of_a_reward_and_the_curves_see_the_points(
    tmp_path, monkeypatch, clip_rewards, seen_by_loss
):
    """In a game in which a move to the right costs 7 points, and that ends after 5 without."""
    seen, compute_returns, step = set(), a2c.compute_returns, a2c.MaxAndSkip.step

    def spied_returns(rewards, *rest):
        seen.update(rewards.unique().tolist())
        return compute_returns(rewards, *rest)

    def expensive_step(env, action):
        frames, _, *rest = step(env, action)
        return frames, -7.0 * (action == 2), *rest

    monkeypatch.setattr(a2c, "compute_returns", spied_returns)
    monkeypatch.setattr(a2c.MaxAndSkip, "step", expensive_step)  # forked workers have it too
    train(tmp_path, max_idle_steps=5, clip_rewards=clip_rewards)
    assert seen == seen_by_loss
    (run_dir,) = tmp_path.iterdir()
    scores = {score for _, score in points(run_dir, "charts/episodic_return")}
    assert min(scores) <= -7 and all(score % 7 == 0 for score in scores)
    assert min(length for _, length in points(run_dir, "charts/episodic_length")) == 5


def test_whole_games_are_logged_once_each(tmp_path):
    """Games of five lives, each at the timestep of its last decision."""
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    result = a2c.train(a2c.Args(num_envs=4, total_timesteps=1800, runs_dir=tmp_path))
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    (run_dir,) = tmp_path.iterdir()
    returns, lengths = (points(run_dir, f"charts/episodic_{what}") for what in ("return", "length"))
    assert len(returns) == len(lengths) == result["games"] > 3
    steps = [step for step, _ in returns]
    assert steps == sorted(set(steps)) and 0 < steps[0] and steps[-1] <= 1800
    assert result["mean_return"] == pytest.approx(np.mean([score for _, score in returns]))
    assert min(length for _, length in lengths) > 5 * 15  # five lives, not one


def test_a_run_needs_no_package_of_a_certain_name(tmp_path, monkeypatch):
    """opencv-python-headless is as good as opencv-python."""
    find = importlib.metadata.Distribution.from_name

    def from_name(name):
        if name == "opencv-python":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)
    assert train(tmp_path, num_envs=1, total_timesteps=5)
    (result,) = tmp_path.glob("*/result.json")
    assert json.loads(result.read_text())["versions"]["cv2"] == cv2.__version__


def test_a_file_is_whole_on_the_disk_before_its_name_and_the_name_before_we_go_on(
    tmp_path, monkeypatch
):
    calls, fsync, replace = [], os.fsync, os.replace

    def spied_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("folder" if is_folder else "file")
        fsync(descriptor)

    def spied_replace(*paths):
        calls.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    a2c.save(tmp_path / "file.pth", {"a": 1})
    assert calls == ["file", "replace", "folder"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 0}, "--num-envs must be 1 or more, not 0"),
        ({"num_envs": -3}, "--num-envs"),
        ({"num_steps": 0}, "--num-steps"),
        ({"total_timesteps": 79}, "--total-timesteps"),
        ({"max_idle_steps": -1}, "--max-idle-steps must be 0 or more"),
        ({"average_decay": 1.0}, "--average-decay must be from 0 to below 1"),
        ({"rmsprop_alpha": -0.1}, "--rmsprop-alpha"),
        ({"gamma": float("nan")}, "--gamma must be from 0 to 1, not nan"),
        ({"gamma": 1.1}, "--gamma"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"rmsprop_eps": 0.0}, "--rmsprop-eps"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm"),
        ({"entropy_coef": -0.1}, "--entropy-coef"),
        ({"value_loss_coef": float("nan")}, "--value-loss-coef"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**31}, "--seed"),
        ({"log_every": 0}, "--log-every"),
        ({"save_every": 0}, "--save-every"),
        ({"checkpoint_every": 0}, "--checkpoint-every"),
        ({"num_envs": 10**9, "total_timesteps": 10**11}, "not enough memory"),
        ({"env_id": "NoSuchGameNoFrameskip-v4"}, "not a game of ale-py"),
        ({"env_id": "CartPole-v1"}, "not a game of ale-py"),
        ({"env_id": "ALE/Breakout-v5"}, "not a game of ale-py"),
        ({"env_id": "Breakout-v4"}, "not a game of ale-py"),
        ({"env_id": "BreakoutNoFrameskip-v0"}, "not a game of ale-py"),
        ({"env_id": "not an id"}, "not a game of ale-py"),
        ({"env_id": ""}, "--env-id"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        a2c.train(a2c.Args(**{"runs_dir": tmp_path / "runs"} | changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_one_message_on_the_command_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "Not a directory" in one_line(run("--runs-dir", tmp_path / "file"))
    refused = run("--gamma", "nan", "--runs-dir", tmp_path / "runs")
    assert refused.returncode == 2 and "--gamma must be from 0 to 1, not nan" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "runs").exists()


def test_ctrl_c_saves_and_exits(tmp_path):
    process = start("--num-envs", 4, "--runs-dir", tmp_path)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGTERM)  # it is for the parent to say when they end
    for pid in [*workers, *workers, process.pid]:  # a terminal sends it to all of them
        os.kill(pid, signal.SIGINT)
        time.sleep(0.1)  # else two signals can become one
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == "" and gone(workers)
    (run_dir,) = tmp_path.iterdir()
    end = f" timesteps are done; continue with --resume {run_dir}. Everything is in {run_dir}\n"
    assert output.endswith(end)
    assert {"checkpoint.pth", "weight_end.pth", "result.json"} <= set(os.listdir(run_dir))


def test_a_request_that_arrives_twice_is_one(tmp_path):
    process = start("--num-envs", 4, "--runs-dir", tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)  # else two signals can become one
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 0
    assert "result.json" in os.listdir(next(tmp_path.iterdir()))


def test_a_second_ctrl_c_ends_a_run_whose_worker_hangs(tmp_path):
    process = start("--num-envs", 4, "--runs-dir", tmp_path)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert gone(workers, seconds=10) and process.communicate()[1] == ""


def test_a_killed_parent_leaves_nothing_running(tmp_path):
    process = start("--num-envs", 4, "--runs-dir", tmp_path)
    workers = children(process.pid)
    process.kill()
    assert process.communicate(timeout=30)[1] == ""
    assert len(workers) == 2 and gone(workers)


def test_ctrl_c_while_torch_is_imported_prints_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--runs-dir", tmp_path], stderr=subprocess.PIPE, text=True,
        # Tests that were started in the background ignore SIGINT; their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=30)[1]


def test_memory_does_not_grow(tmp_path):
    """Over a short while, in a process of its own; benchmarks/breakout_memory.py looks longer."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import a2c_breakout as a2c
sizes = []
losses = a2c.compute_losses
def counted(*arguments):
    pids = ["self", *(worker.pid for worker in a2c.torch.multiprocessing.active_children())]
    sizes.append(sum(int(open(f"/proc/{{pid}}/statm").read().split()[1]) for pid in pids))
    return losses(*arguments)
a2c.compute_losses = counted
a2c.train(a2c.Args(num_envs=4, total_timesteps=2000, log_every=10, runs_dir=a2c.Path(sys.argv[1])))
print(max(sizes[20:50]), max(sizes[-30:]))
"""
    process = run("-c", code, tmp_path, script="-u")
    early, late = map(int, process.stdout.splitlines()[-1].split())
    assert late < 1.02 * early
