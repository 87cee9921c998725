"""PRT on real language weights: stories260K, a GPT of 260,000 parameters, learns to tell in the first person.

python tests/measure/stories.py write tinystories.json stories     makes stories/{book,train,test}.*
python tests/measure/stories.py count stories --reward s/reward.pt --base s/new.pt --tuned-source s/tuned.pt

`write` takes a JSON list of TinyStories and puts a fifth of them, those with one person, into the first
person, after their first sentence, which is the prompt; book.txt holds all others as they are. `count` prints
how many of the stories that the models sample for the test prompts are told in the first person: outside of
quotation marks, "I" is more frequent than "he" and "she" together. The commands in between: tests/RESULTS.md
"""
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import files, text
from eval import Row, tilted
from models import answers, flags, gpt, runs, weights

PRONOUNS = {r"[Ss]he|[Hh]e": "I", r"(?:her|him)(?=[.,;!?]| and | to | that | with | for )": "me",
            "her|his": "my", "Her|His": "My", "him": "me", "herself|himself": "myself"}


def told(story):
    """Returns a story without what is in quotation marks."""
    return " ".join(story.split('"')[::2])


def count(words, story):
    return len(re.findall(rf"\b(?:{words})\b", told(story)))


def first_person(story):
    """Returns (first sentence, the rest in the first person), or None if it has no or several persons."""
    match = re.search(r"named (\w+)\b.*?[.!?]\s+", story, re.S)
    she, he = count("[Ss]he|[Hh]er", story), count("[Hh]e|[Hh]is|[Hh]im", story)
    if not match or max(she, he) < 3 or min(she, he) > 0:
        return None
    parts = story[match.end():].split('"')
    for words, replacement in {rf"{match[1]}'s": "my", match[1]: "I", **PRONOUNS}.items():
        parts[::2] = [re.sub(rf"\b(?:{words})(?!\w)", replacement, part) for part in parts[::2]]
    return story[:match.end()].strip(), '"'.join(parts)


def write(source, folder):
    """Writes train.jsonl, test.jsonl, and book.txt; every fourth converted story is for the test."""
    with files.explain(f"{source}: not a JSON list of stories", ValueError):
        stories = json.loads(source.read_text("utf-8"))
    if not isinstance(stories, list) or not all(isinstance(story, str) for story in stories):
        raise ValueError(f"{source}: not a JSON list of stories")
    converted = {story: pair for story in stories if (pair := first_person(story))}
    if len(converted) < 2 or len(converted) == len(stories):
        raise ValueError(f"{source}: {len(converted)} of {len(stories)} stories can be put into the first "
                         "person; needs at least two of them, and another one for book.txt")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(dict(prompt=prompt, response=" " + rest)) for prompt, rest in converted.values()]
    for name, part in dict(train=[row for i, row in enumerate(rows) if i % 4], test=rows[::4]).items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", "utf-8")
    others = [story for story in stories if story not in converted]
    (folder / "book.txt").write_text("\n\n".join(others), "utf-8")
    print(f"{len(rows)} stories in the first person, {len(others)} others")


@torch.no_grad()
def score(args):
    """Prints the share of sampled stories in the first person, with a standard error."""
    reward, base = weights.load(args.reward, "prt"), weights.load(args.base, "base")
    source, tuned = weights.load(reward.info["source"], "base"), weights.load(args.tuned_source, "ft")
    named = {args.reward: reward, args.base: base, reward.info["source"]: source, args.tuned_source: tuned}
    tokenizer, end = gpt.same_vocabulary(named), reward.arch["end"]
    eft = [(tuned.info["beta"], 1, tuned), (tuned.info["beta"], -1, source)]
    rows = [Row("source alone", None, source, [], source), Row("source fine-tuned", None, tuned, [], source),
            Row("new alone", None, base, [], base),
            tilted("new + reward (PRT)", base, [(reward.info["beta"], 1, reward)], args.beta),
            tilted("new + EFT", base, eft, args.beta)]
    examples = text.load(str(args.folder), "test")[1]
    prompts = [text.token_ids(parts[:1], tokenizer, end)[0] for _, parts in examples]
    room = min(model.arch["positions"] for model in named.values())
    how = answers.Decoding(len(prompts), room - max(map(len, prompts)), args.temperature)
    for row in rows:
        written = answers.generate(row, prompts, how, [end], room)
        stories = [tokenizer.decode(answer, first=False) for answer in written]
        share = sum(count("I", story) > count("[Ss]he|[Hh]e", story) for story in stories) / len(stories)
        error = (share * (1 - share) / len(stories)) ** 0.5
        print(f"{row.method:20}{share:6.0%} +- {error:.0%}   {stories[0][:200]!r}")


def main():
    p = flags.parser(__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    writing, counting = commands.add_parser("write"), commands.add_parser("count")
    writing.add_argument("source", type=Path)
    for parser in (writing, counting):
        parser.add_argument("folder", type=Path)
    for flag in ("reward", "base", "tuned-source"):
        counting.add_argument(f"--{flag}", required=True)
    counting.add_argument("--beta", type=flags.positive(float), default=1.0)
    counting.add_argument("--temperature", type=float, default=0.7)
    args = p.parse_args()
    if args.command == "write":
        write(args.source, args.folder)
    else:
        score(args)


if __name__ == "__main__":
    runs.main(main)
