"""Measures whether a reward becomes outdated: one reward on five bases, each larger and trained for longer.

python tests/measure/generations.py --seeds 0 1 2        15 minutes a seed on two CPU cores

In both built-in worlds the first base, or generation, is the old base of models/examples.py; the later ones
are pretrained as its new base is, but in the sizes and for the steps in GROWN. A reward and, for EFT, a tuned
source are trained once, on the first. Each base is scored on the test split (text: 400 problems): alone, with
the reward, with EFT, and fine-tuned itself, which has to be done anew for each. The models stay in the folder
OUT/WORLD-SEED, where finished ones are not trained again; OUT gets table.json and figure.png.
"""
import json
import statistics
import time
from pathlib import Path

import figures
import tickets

import train_lm
import train_vision
from data import files
from models import examples, flags, pretrain, runs, weights

# World -> generation -> steps of pretraining, and what is larger than in the first generation.
GROWN = dict(
    shapes=dict(base2=(650, dict(width=80, heads=4)), base3=(700, dict(width=96, heads=3)),
                base4=(750, dict(width=128, heads=4)), base5=(800, pretrain.CLIPS["small"])),
    arithmetic=dict(base2=(550, dict(width=72, head_width=18, mlp=192)),
                    base3=(600, dict(width=80, head_width=20, mlp=216)),
                    base4=(650, dict(width=96, head_width=24, mlp=256)), base5=(700, pretrain.GPTS["new"])))
# World -> its example, the script that trains, its sizes, the first one, and for eval.py: column and flags.
WORLDS = dict(shapes=(examples.VISION, train_vision, pretrain.CLIPS, pretrain.TINY, "top1", []),
              arithmetic=(examples.TEXT, train_lm, pretrain.GPTS, pretrain.OLD, "exact",
                          ["--new-tokens", "16", "--limit", "400"]))


def train(world, seed, folder):
    """Trains the models that are not finished, and returns the seconds that each of them took."""
    example, script, sizes, first, *_ = WORLDS[world]
    sizes |= {base: first | larger for base, (_, larger) in GROWN[world].items()}
    recipe = {stage.name: stage.flags.split() for stage in example.stages}
    seconds, models = {}, dict(base1=recipe["old"])
    models |= {base: [*recipe["new"], "--steps", str(steps)] for base, (steps, _) in GROWN[world].items()}
    sources = dict(reward="base1", tuned_source="base1") | {f"tuned_{base}": base for base in models}
    for name, base in sources.items():  # of two equal flags, such as --source, the later one counts
        models[name] = [*recipe.get(name, recipe["tuned_base"]), "--source", f"{folder}/{base}.pt"]
    for name, words in models.items():
        path, clock = folder / f"{name}.pt", folder / f"{name}.seconds"
        args = script.parse([*words, "--seed", str(seed), "--out", str(path)])
        args.size = name if name in sizes else args.size  # parse knows the examples' sizes only
        if not clock.exists():
            path.unlink(missing_ok=True)  # not finished: it is unknown how long it took
            begin = time.perf_counter()
            with weights.run(args) as state:
                script.train(args, runs.setup(), state)
            clock.write_text(f"{time.perf_counter() - begin:.1f}")
        elif files.read(path)["args"] != weights.settings(args):
            raise ValueError(f"{path} was made with other flags: choose another --out")
        seconds[name] = float(clock.read_text())
    return seconds


def measure(world, seed, folder):
    """Returns a dict of what the models of a world took and reach; its generations are dicts in a list."""
    seconds, (*_, column, scoring) = train(world, seed, folder), WORLDS[world]
    generations = []
    for base in ("base1", *GROWN[world]):
        report, tuned = f"{folder}/{base}.json", f"{folder}/tuned_{base}.pt"
        # --run sets --reward and --tuned-source.
        tickets.call("eval.py", "--run", folder, "--base", f"{folder}/{base}.pt", "--tuned-base", tuned,
                     "--json", report, *scoring)
        table = json.loads(Path(report).read_text())
        once = base == "base1"
        generations.append({
            # Of a CLIP, what was tuned is what classifies: the image tower and the classes.
            "thousand parameters": sum(p.numel() for p in weights.load(tuned).parameters()) / 1000,
            "KL(source || base)": table["kl_of_bases"],
            "pretraining, s": seconds[base], "fine-tuning, s": seconds[f"tuned_{base}"],
            "reward, s": seconds["reward"] * once, "tuned source, s": seconds["tuned_source"] * once,
            **{x["method"]: x[column] for x in table["rows"] if x["method"] in figures.LINES}})
    result = dict(world=world, seed=seed, device=table["device"], seconds=seconds, generations=generations)
    show([result])
    return result


def show(results):
    """Prints the generations of a world: of one seed, or means and standard deviations over several."""
    print("\n{world}, {device}, seed ".format(**results[0]) + ", ".join(str(x["seed"]) for x in results))
    print("| generation | 1 | 2 | 3 | 4 | 5 |\n|---|---|---|---|---|---|")
    for name in results[0]["generations"][0]:
        each = zip(*([x[name] for x in result["generations"]] for result in results))
        cells = [tickets.spread(x) if name.startswith("base") else f"{statistics.mean(x):.3g}" for x in each]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main():
    p = flags.parser(__doc__)
    p.add_argument("--seeds", type=flags.from_0(int), nargs="+", default=[0], help="(default: 0)")
    p.add_argument("--out", type=Path, default=Path("out/generations"), help="(default: out/generations)")
    args, results = p.parse_args(), []
    for world in WORLDS:
        results += [measure(world, seed, args.out / f"{world}-{seed}") for seed in args.seeds]
        if len(args.seeds) > 1:
            show(results[-len(args.seeds):])
    (args.out / "table.json").write_text(json.dumps(results, indent=1))
    figures.draw_generations([args.out / "table.json"], args.out / "figure.png")


if __name__ == "__main__":
    runs.main(main)
