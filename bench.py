"""bench.py: what is claimed is measured here. Ratios are taken in one run on one machine; bare times say little elsewhere.

    python bench.py latency [--preset nitrogen]            one chunk by part, against the released way of sampling
    python bench.py throughput [--video FILE] [--out DIR]  cutting clips against bare decoding, localisation, the parser, its net

In: nothing but the shipped weights (and a video of your own, if given). Out: a table on the terminal; with --out also throughput.json.
"""
import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

import extract
import model as M
import parse
import sample


# ----------------------------------------------------------------------------------------------------------------------- latency
def latency(args):
    """Seconds for one chunk, by part, against the same model sampled as the release does; both in turn, so that a busy machine slows both."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device, reason = M.pick_device(args.device)
    model = (M.load(args.ckpt, device, unused=False)[0] if args.ckpt else fresh(args.preset, device)).eval()
    c, g = model.config, torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, c.frames, c.image, c.image, 3), dtype=torch.uint8, generator=g).to(device)
    noise = torch.randn(1, c.horizon, c.action_dim, generator=g).to(device)
    print(f"{args.ckpt or args.preset}: {M.count(model)[0]:,} parameters, float32, batch 1, {device} ({reason}), torch {torch.__version__}, "
          f"best of {args.repeats}; wall seconds (CPU seconds)")
    for k in args.steps:
        runs = []
        for _ in range(args.repeats):
            watch = Stopwatch(device)
            ours = our_way(model, frames, noise, k, watch)
            theirs = released_way(model, frames, noise, k, watch)
            same_kernel = released_way(model, frames, noise, k, watch, "mixing and K/V each step, our products", few_rows=M.FEW_ROWS)
            runs.append(watch.laps)
        best = {name: min(r[name] for r in runs) for name in runs[0]}
        cpu = {name: min(r[name][1] for r in runs) for name in runs[0]}
        for name, (wall, _) in best.items():
            print(f"{k:3} steps | {name:40} {wall:8.3f} s ({cpu[name]:.3f})")
        released = best["the released way"]
        print(f"{k:3} steps | {released[0] / best['ours'][0]:.2f} x faster than the released way in wall time, {cpu['the released way'] / cpu['ours']:.2f} x in CPU time; "
              f"largest difference {max((ours - theirs).abs().max(), (ours - same_kernel).abs().max()):.1e}")
    peak = peak_memory()
    if peak:
        print(f"peak memory of the process {peak / 2**30:.2f} GiB ({peak / 1e9:.2f} GB)")


def our_way(model, frames, noise, k, watch):
    """One chunk as sample.py computes it, timed by part."""
    with torch.inference_mode():
        total = watch.start()
        lap = watch.start()
        seen = model.see(frames)
        lap = watch.lap("  vision", lap)
        x = model.assemble(seen)
        for block in model.mixing:
            x = block(x)
        lap = watch.lap("  mixing", lap)
        context = M.Context(x, [block.attn.kv(x) if model.crosses(i) else None for i, block in enumerate(model.dit)])
        lap = watch.lap("  keys and values", lap)
        times = model.times(sample.buckets(k, model.config.buckets).to(noise.device))
        lap = watch.lap("  time codes and AdaLN of all steps", lap)
        out = sample.euler(model, context, noise, k, times=times)
        watch.lap("  steps", lap)
        watch.lap("ours", total)
        return out


def released_way(model, frames, noise, k, watch, name="the released way", few_rows=0):
    """One chunk as the released sampler computes it: mixing, keys and values, time codes and AdaLN anew at each step, torch's default matrix
    product. Kinder than the release, which also runs the unused pooling head."""
    ours, M.FEW_ROWS = M.FEW_ROWS, few_rows
    try:
        with torch.inference_mode():
            total, x, seen = watch.start(), noise, model.see(frames)
            for t in sample.buckets(k, model.config.buckets).to(noise.device):
                x = x + model.velocity(x, t[None], model.mix(model.assemble(seen))) / k
            watch.lap(name, total)
            return x
    finally:
        M.FEW_ROWS = ours


class Stopwatch:
    """Wall and CPU seconds by name; waits for a GPU to finish first."""
    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.laps = {}

    def start(self):
        self.wait()
        return time.perf_counter(), time.process_time()

    def lap(self, name, since):
        now = self.start()
        self.laps[name] = now[0] - since[0], now[1] - since[1]
        return now


def fresh(preset, device):
    """A preset with random weights everywhere, also where training starts from zeros: a velocity of 0 would compare well with anything."""
    model = M.create(M.preset(preset), device=device)
    with torch.no_grad():
        for p in [model.proj_out_1.weight, model.action_decoder.layer2.W, *(block.ada.weight for block in model.dit)]:
            p.normal_(0, 0.02)
    return model


def peak_memory():
    """The most this process has held, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_latency(sub):
    """The flags of `bench.py latency`."""
    p = sub.add_parser("latency", help="seconds for one chunk, by part, against the released way of sampling", allow_abbrev=False)
    p.add_argument("--preset", default="nitrogen", help="the model, with random weights (default nitrogen, the released 493 M)")
    p.add_argument("--ckpt", help="a checkpoint in place of random weights")
    p.add_argument("--steps", type=int, nargs="+", default=[16, 4], metavar="K", help="numbers of Euler steps (default 16 4)")
    p.add_argument("--repeats", type=int, default=3, help="the best of this many (default 3)")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    p.set_defaults(run=latency)


# ------------------------------------------------------------------------------------------------------------------- throughput
def throughput(args):
    """Speeds of extract and parse as ratios: each pair of figures is taken in turn in this run. Prints a table; --out keeps it as JSON."""
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__, "opencv": cv2.__version__}
    with tempfile.TemporaryDirectory() as tmp:
        video = Path(args.video) if args.video else drawn_video(Path(tmp) / "drawn.mp4", args.seconds)
        result |= cutting_against_decoding(video, Path(tmp), args.repeats) | localisation(video)
    speed, real_time = parser_speed()
    result |= {"parser_frames_per_s": round(speed, 1), "parser_x_real_time_at_30_fps": round(real_time, 2)}
    against = segformer_against_transformers()
    if against:
        result |= {"segformer_b0_images_per_s": round(against[0], 1), "transformers_b0_images_per_s": round(against[1], 1), "segformer_over_transformers": round(against[2], 2)}
    for name, value in result.items():
        print(f"{name:36} {value}")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        extract.write_json(Path(args.out) / "throughput.json", result)


def drawn_video(path, seconds, size=(1280, 720), fps=30):
    """A 720p video of a scrolling backdrop with one of our pads played on it."""
    rng = np.random.default_rng(0)
    back, skin = extract.backdrop(rng, size[1], 2 * size[0]), extract.our_skins()[1]
    width, height = 280, round(280 * skin.size[1] / skin.size[0])
    with extract.VideoWriter(path, fps, size) as video:
        for t, action in enumerate(parse.play(rng, seconds * fps)):
            frame = np.roll(back, -5 * t, 1)[:, :size[0]].copy()
            rgba = cv2.resize(extract.draw(skin, action), (width, height), interpolation=cv2.INTER_AREA)
            ground, alpha = frame[20:20 + height, 30:30 + width], rgba[..., 3:] / 255 * 0.9
            ground[:] = (rgba[..., :3] * alpha + ground * (1 - alpha)).astype(np.uint8)
            video.add(frame)
    return path


def cutting_against_decoding(video, tmp, repeats):
    """The whole pass (policy frames, crops, JPEG, files) over a bare sequential decode of the same file, in turn, best of each."""
    info, skin, best = extract.video_info(video), extract.our_skins()[1], {}
    affine = np.float64([[0.2 * info["size"][0] / skin.size[0], 0, 30], [0, 0.2 * info["size"][0] / skin.size[0], 20]])
    for _ in range(repeats):
        for name in ("decode", "pass", "pass_every_2"):
            began = time.perf_counter()
            if name == "decode":
                capture = extract.open_video(video)
                while capture.read()[0]:
                    pass
            else:
                extract.Cutter(info["size"], 2 if name.endswith("2") else 1, skin, affine, extract.pose_box(affine, skin.size)).run(video, tmp)
            best[name] = min(best.get(name, 1e9), time.perf_counter() - began)
    return {"pass_over_decode": round(best["pass"] / best["decode"], 2), "pass_over_decode_every_2": round(best["pass_every_2"] / best["decode"], 2),
            "pass_frames_per_s": round(info["n"] / best["pass"], 1)}


def localisation(video):
    """Seconds and CPU seconds to look for an overlay among all of our templates, features of the templates already known."""
    matcher = extract.Matcher(extract.our_skins(), ("sift", "xfeat"), extract.load_xfeat())
    wall, cpu = time.perf_counter(), time.process_time()
    find, _ = extract.localise(extract.sample_frames(video)[0], matcher)
    return {"localise_s": round(time.perf_counter() - wall, 2), "localise_cpu_s": round(time.process_time() - cpu, 2), "localise_templates": len(matcher.skins),
            "localise_found": find is not None}


def parser_clip(folder, frames, fps, skin):
    """A clip folder of a drawn skin over a scrolling backdrop, 320 px crops in JPEG as extract.py leaves them."""
    rng = np.random.default_rng(0)
    back, pad = extract.backdrop(rng, 300, 320 + 2 * frames), (320, round(320 * skin.size[1] / skin.size[0]))
    folder.mkdir(parents=True)
    writer = extract.FramesWriter(folder, "pads")
    for t, action in enumerate(parse.play(rng, frames)):
        rgba = cv2.resize(extract.draw(skin, action), pad, interpolation=cv2.INTER_AREA)
        alpha = rgba[..., 3:] / 255 * 0.8
        writer.add(t, np.rint(alpha * rgba[..., :3] + (1 - alpha) * back[:pad[1], 2 * t:2 * t + 320]).astype(np.uint8))
    writer.close(frames)
    clip = dict(fps=fps, n=frames, box=[0, 0, *pad], template=skin.name, controller=skin.family, pad=pad,
                geometry=dict(size=skin.size, buttons=skin.buttons, sticks=skin.sticks))
    (folder / "clip.json").write_text(json.dumps(clip, default=float))


def parser_speed(frames=1800, fps=30):
    """`parse.py run` on one clip: crops from disk (JPEG) to actions.npy. -> (frames / s, multiple of real time)."""
    model = parse.load_parser(parse.CKPT)
    with tempfile.TemporaryDirectory() as tmp:
        parser_clip(Path(tmp) / "clip", frames, fps, extract.our_skins()[0])
        began = time.perf_counter()
        parse.run_clip(model, Path(tmp) / "clip")
        took = time.perf_counter() - began
    return frames / took, frames / fps / took


def segformer_against_transformers(preset="b0", shape=(8, 3, 128, 256), runs=5):
    """Our forward pass against transformers' SegformerForSemanticSegmentation of the same size, alternating in one run, best of each.
    -> (our images / s, theirs, ratio), or None where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    sizes = parse.PRESETS[preset]
    config = transformers.SegformerConfig(hidden_sizes=list(sizes["dims"]), depths=list(sizes["depths"]), num_attention_heads=list(sizes["heads"]),
                                          sr_ratios=list(sizes["sr"]), mlp_ratios=[sizes["mlp"]] * 4, decoder_hidden_size=sizes["head"], num_labels=10)
    nets = [parse.SegFormer(**sizes, labels=10).eval().to(memory_format=torch.channels_last), transformers.SegformerForSemanticSegmentation(config).eval()]
    x, best = torch.randn(shape), [1e9, 1e9]
    with torch.inference_mode():
        for _ in range(runs + 1):
            for i, net in enumerate(nets):
                began = time.perf_counter()
                net(x)
                best[i] = min(best[i], time.perf_counter() - began)
    ours, theirs = (shape[0] / b for b in best)
    return ours, theirs, ours / theirs


# ----------------------------------------------------------------------------------------------------------------- command line
def add_throughput(sub):
    """The flags of `bench.py throughput`."""
    p = sub.add_parser("throughput", help="cutting clips against bare decoding, localisation, the parser, its net", allow_abbrev=False)
    p.add_argument("--video", help="a video of your own (default: one is drawn)")
    p.add_argument("--seconds", type=int, default=20, help="length of the drawn video (default 20)")
    p.add_argument("--repeats", type=int, default=3, help="the best of this many (default 3)")
    p.add_argument("--out", help="folder for throughput.json (default: print only)")
    p.set_defaults(run=throughput)


def main(argv=None):
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = parser.add_subparsers(required=True, metavar="COMMAND")
    add_latency(sub)
    add_throughput(sub)
    return extract.cli(parser, argv, M.ModelError)


if __name__ == "__main__":
    sys.exit(main())
