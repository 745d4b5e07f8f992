"""What a run takes at least: closed forms against operators that were counted, limits against arithmetic by hand."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import roofline as bench
from selfforcing_core.attention import attention_kernel
from selfforcing_core.codecs.taehv import TAEHV, StreamingDecoder
from selfforcing_core.codecs.wan_vae import StreamingWanDecoder, WanVAE
from selfforcing_core.config import NETWORK_SIZES, TAEHVConfig, WanConfig
from selfforcing_core.generate.cli import main
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.model import CausalWan
from selfforcing_core.roofline import device as device_module
from selfforcing_core.roofline.device import CARDS, Card
from selfforcing_core.roofline.meter import Meter, Recipe
from selfforcing_core.roofline.work import Work, pass_flops, taehv_flops, wan_vae_flops

CONFIG = WanConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=3, text_dim=64, text_len=16)
SMALL = TAEHVConfig(decoder_widths=(16, 8, 8, 4), encoder_width=4)


def counted(work: object) -> int:
    with torch.no_grad(), attention_kernel("math"), FlopCounterMode(display=False) as counter:
        work()  # type: ignore[operator]
    return counter.get_total_flops()


# --------------------------------------------------------------------- work --
@pytest.mark.parametrize("time", [(False, True, True), (True, True, True)])
@pytest.mark.parametrize("space", [(True, True, True), (True, False, True)])
def test_taehv_flops_are_those_of_its_operators(time: tuple[bool, ...], space: tuple[bool, ...]) -> None:
    config = TAEHVConfig(**{**vars(SMALL), "decoder_time": time, "decoder_space": space})
    network = TAEHV(config).fold()
    assert counted(lambda: network.decode_untrimmed(torch.zeros(1, 3, 16, 4, 6))) == taehv_flops(config, 3, 4, 6)


def test_wan_vae_flops_are_those_of_its_operators_behind_the_first_frame() -> None:
    autoencoder = pytest.importorskip("diffusers").AutoencoderKLWan(base_dim=16, z_dim=16)
    stream = StreamingWanDecoder(WanVAE(autoencoder))
    latents = torch.zeros(1, 1, 16, 4, 6)
    for _ in range(3):  # the second and third still fill the caches in time
        stream.decode(latents)
    assert counted(lambda: stream.decode(latents)) == wan_vae_flops(1, 4, 6, dim=16)


def test_a_pass_is_the_sum_of_its_groups() -> None:
    recipe = Recipe(CONFIG, (3, 3), 8, 12, decoder="none")
    first, second = recipe.a_pass(0), recipe.a_pass(1)
    assert first.flops == pass_flops(CONFIG, 72, 72)
    assert second.flops == pass_flops(CONFIG, 72, 144)
    assert second.linear_flops == first.linear_flops
    assert (first + second).flops == first.flops + second.flops
    assert (first * 3).attention_bytes == 3 * first.attention_bytes


def test_the_published_size_takes_the_published_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--json", "--model", "t2v-1.3b"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tflop_per_pass"] == [16.18, 20.22, 24.26, 28.3, 32.33, 36.37, 40.41]
    assert report["mean_tflop_per_pass"] == 28.3
    assert report["tflop_of_decode"] == {"taehv": 1.3, "vae": 40.65}
    assert set(report["cards"]) == set(CARDS)
    h100 = report["cards"]["h100"]
    assert h100["none"]["attainable"]["fps"] < h100["none"]["data_sheet"]["fps"]
    assert h100["vae"]["attainable"]["fps"] < h100["taehv"]["attainable"]["fps"] < h100["none"]["attainable"]["fps"]
    for card in report["cards"].values():
        groups = card["vae"]["data_sheet"]["seconds_by_group"]
        assert sum(groups.values()) == pytest.approx(sum(card["vae"]["data_sheet"]["chunk_seconds"]))


def test_sizes_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--frames", "80"]) == 2
    assert "81" in capsys.readouterr().err


# ------------------------------------------------------------------- limits --
def test_a_group_takes_the_longer_of_arithmetic_and_traffic() -> None:
    card = Card(100.0, 10.0)
    work = Work(linear_flops=1000, linear_bytes=10, attention_flops=100, attention_bytes=50, elementwise_bytes=20)
    assert work.seconds(card) == {"linears": 10, "attention": 5, "elementwise": 2, "decode": 0}
    assert work.seconds(card.attainable)["linears"] == pytest.approx(10 / 0.8)


def test_windows_clean_passes_and_guidance_are_counted() -> None:
    def chunk(index: int, **more: object) -> float:
        return Recipe(CONFIG, (3, 3, 3), 8, 12, **more).chunk(index).flops  # type: ignore[arg-type]

    decode = taehv_flops(TAEHVConfig(), 3, 8, 12)
    assert chunk(0) == 5 * pass_flops(CONFIG, 72, 72) + decode
    assert chunk(2) == 4 * pass_flops(CONFIG, 72, 216) + decode
    assert chunk(2, commit_last=True) == 5 * pass_flops(CONFIG, 72, 216) + decode
    assert chunk(2, window=6) == 4 * pass_flops(CONFIG, 72, 144) + decode
    assert chunk(0, writes=False) == 4 * pass_flops(CONFIG, 72, 72) + decode
    assert chunk(0, guided=True, decoder="none") == 10 * pass_flops(CONFIG, 72, 72)
    assert chunk(0, batch=2, decoder="none") == 10 * pass_flops(CONFIG, 72, 72)
    # Chunks denoised together: one by one they come in, then a pass finishes one; each is written by one of its own.
    joint = sum(pass_flops(CONFIG, 72 * count, 72 * count) for count in (1, 2, 3, 3))  # the video has no fourth
    assert chunk(0, is_joint=True, decoder="none") == joint + pass_flops(CONFIG, 72, 72)
    ending = pass_flops(CONFIG, 144, 216) + pass_flops(CONFIG, 72, 144)
    assert chunk(1, is_joint=True, decoder="none") == ending


def test_a_run_at_the_limit_has_all_of_it() -> None:
    recipe = Recipe(CONFIG, (3, 3, 3), 8, 12)
    meter = Meter(recipe, Card(1e12, 1e11, 1.0, 1.0))
    floors = recipe.limits(meter.card)["chunk_seconds"]
    shares = meter.reached(floors)
    assert shares["share_of_limit"] == pytest.approx(1)
    assert shares["time_by_group"]["above_limit"] == pytest.approx(0)
    slower = meter.reached([2 * seconds for seconds in floors])
    assert slower["share_of_limit"] == pytest.approx(0.5)
    assert sum(slower["time_by_group"].values()) == pytest.approx(1)


def test_a_device_is_measured_with_work_that_keeps_it_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger until it takes long enough, and no larger than the largest."""
    seconds = {64: 1e-6, 128: 9e-4, 256: 2e-3, 512: 1.0}
    monkeypatch.setattr(device_module, "_median_seconds", lambda work, _: seconds[work().shape[0]])
    cpu = torch.device("cpu")
    monkeypatch.setattr(device_module, "MATMUL_SIZES", (64, 512))
    assert device_module.matmul_rate(cpu, torch.float32) == 2 * 256**3 / 2e-3
    monkeypatch.setattr(device_module, "COPY_BYTES", (64, 128))
    assert device_module.copy_rate(cpu) == 2 * 128 / 9e-4


# ------------------------------------------------------------------- memory --
@pytest.mark.parametrize(("dim", "ffn", "size"), [(256, 1024, (16, 28)), (512, 2048, (30, 52)), (512, 4096, (16, 28))])
def test_peak_memory_is_predicted(dim: int, ffn: int, size: tuple[int, int]) -> None:
    """Against tensors that were alive at once in a real pass: a second chunk, its cache and its prompt included."""
    config = WanConfig(dim=dim, ffn_dim=ffn, num_heads=dim // 128, num_layers=2, text_dim=64, text_len=32)
    network, text = CausalWan(config), torch.zeros(1, 32, 64)
    frames, options = (
        (torch.zeros(1, 3, 16, *size), torch.zeros(1, 3)),
        {"latent_height": size[0], "latent_width": size[1]},
    )
    tracker = MemTracker()
    tracker.track_external(network)
    with torch.no_grad(), tracker:
        cache: KVCache = network.new_cache(batch=1, capacity=6, like=text, **options)
        network(*frames, text, cache=cache)
        tracker.reset_mod_stats()
        network(*frames, text, cache=cache, start_frame=3)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    recipe = Recipe(config, (3, 3), *size, decoder="none", weight_bytes=4, cache_bytes=4, activation_bytes=4)
    assert sum(recipe.peak_bytes().values()) == pytest.approx(peak, rel=0.1)


class AliveBytes(TorchDispatchMode):
    """Bytes of all tensors made by operations that are alive at once, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return results

    def _free(self, address: int, num_bytes: int) -> None:
        self.known.discard(address)
        self.now -= num_bytes


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_the_decoders_memory_is_predicted(frames: int) -> None:
    decoder = StreamingDecoder(TAEHV(TAEHVConfig()).fold())
    with torch.no_grad(), AliveBytes() as alive:
        decoder.decode(torch.zeros(1, frames, 16, 8, 8))
    recipe = Recipe(NETWORK_SIZES["tiny"], (frames,), 8, 8, activation_bytes=4)
    assert recipe.peak_bytes()["working"] == pytest.approx(alive.peak, rel=0.1)


# ------------------------------------------------------------- command line --
def test_the_command_line_says_what_share_of_the_limit_it_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfforcing_core.generate.run.measured_card", lambda device, dtype: Card(1e11, 1e10, 1.0, 1.0))
    command = ["generate", "--prompt", "a red square", "--frames", "21", "--roofline", "--out"]
    assert main([*command, str(tmp_path / "a.mp4"), "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["roofline"]
    assert 0 < shares["share_of_limit"] < 1
    assert shares["peak_bytes"] > 4 * 3.8e6
    assert sum(shares["time_by_group"].values()) == pytest.approx(1)
    assert main([*command, str(tmp_path / "b.mp4")]) == 0
    assert "of this device's limit of" in capsys.readouterr().out


def test_a_run_that_goes_on_has_no_limit_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--prompt", "a", "--roofline", "--image", "x.png", "--out", str(tmp_path / "a.mp4")]
    assert main(command) == 2
    assert "leave out --image and --extend" in capsys.readouterr().err
