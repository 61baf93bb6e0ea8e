"""Make docs/results.md of benchmarks/results/*.json: no figure in a table there is typed by hand.

    python -m benchmarks.results_page

A section names its file, what it says and its tables. The command, commit, machine and versions come from the file.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import peers_rows, pocket_table, results_tables
from benchmarks.results_tables import Row

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
Tables = Callable[[Any], list[str]]
ASKED_AT_8K: dict[str, str] = dict.fromkeys(
    ("AdaKV(ExpectedAttention)", "CriticalKV(SnapKV)", "Compactor"), "asked at 8K alone, for want of time"
)
"""Methods of `benchmarks.peers` that were not asked of Gemma at 16K and 32K."""


@dataclass(frozen=True)
class Section:
    """One file's part of the page. tables: what the file holds -> Markdown tables."""

    title: str
    file: str
    says: str
    tables: Tables


SECTIONS = [
    Section(
        "The quickstart on two CPU cores",
        "quickstart-cpu.json",
        "The bundle that `make quickstart` trained at commit 872274e (10 min 17 s after the set-up), asked with "
        "`lookahead decode smollm2-quickstart --bundle runs/quickstart/bundle --out runs/quickstart` about its own "
        "held-out documents, and with `smollm2-quickstart-again` about those of another seed. 200 tokens of one text "
        "are followed in the first, 128 of eight in the second. A commit in -dirty had files changed, none of "
        "them code that decodes. The first run's documents are those on which `listwise_peak` and 8 bumps were chosen; "
        "the loss that came after, `bpr`, was chosen on others. The second run's questions are others, in text that is "
        "for the most part the same.",
        results_tables.runs,
    ),
    Section(
        "The quickstart on another machine, and asked about documents on which nothing was chosen",
        "quickstart-avx2.json",
        "The same recipe, trained at commit acfa841 on two slower cores beside other work, and its bundle asked with "
        "`smollm2-quickstart-fresh`: source code of three packages that nothing here read, wordings and key words of "
        "their own, fixed by a commit before they were asked. The first run recorded 57fd750, which is 183a2da with "
        "another message; the history has only the latter.",
        results_tables.runs,
    ),
    Section(
        "SmolLM2-135M beside kvpress's methods and page selection",
        "peers-smollm2-h200.json",
        "The recipe's indexer, trained on that GPU. Settings were chosen on 12 questions and 4 texts of another seed. "
        "Milliseconds are of one text, with the same measurement of Gemma beside it.",
        lambda data: [peers_rows.tables(data["rows"])],
    ),
    Section(
        "Gemma-3-270M at 8K beside kvpress's methods and page selection",
        "peers-gemma-h200.json",
        "Settings were chosen on 9 questions and 3 texts of another seed. kvpress's methods are applied to the three "
        "layers with full attention. Milliseconds are of one text, with the same measurement of SmolLM2 beside it.",
        lambda data: [peers_rows.tables(data["rows"])],
    ),
    Section(
        "Gemma-3-270M at 16K beside kvpress's methods and page selection",
        "peers-gemma-16k-h200.json",
        "Another indexer of the same recipe. 24 questions known, 24 unknown, 23 second questions and 8 texts: what "
        "every method had answered when the time was up, all that was asked but one second question. Settings are "
        "those chosen at 8K, on 9 questions and 3 texts of another seed. `--write` writes what is asked; 16 processes "
        "answered it on one GPU, so that no milliseconds a token were taken. `--texts 10` gave 8 texts at that commit. "
        "Full attention was read in both environments, `full, here` in this one; in bf16 they do not always say the "
        "same: of known, unknown and second questions, 21 of 24, 19 of 24 and 22 of 23 answers are alike.",
        lambda data: [peers_rows.tables(data["rows"], ASKED_AT_8K)],
    ),
    Section(
        "Gemma-3-270M at 32K beside kvpress's methods and page selection",
        "peers-gemma-32k-h200.json",
        "As at 16K: 24 questions known, 24 unknown and 8 texts. There is no table of second questions: time was up "
        "before the indexer was asked any. Of full attention's answers in the two environments 17 of 24 are alike with "
        "the question known, 18 of 24 with it unknown.",
        lambda data: [peers_rows.tables(data["rows"], ASKED_AT_8K)],
    ),
    Section(
        "Gemma-3-270M on text of 4K to 32K tokens, with a per-step correction",
        "outputs-gemma-h200.json",
        "Recipe `gemma-3-270m-long`; for each length 30 texts of packages that no training read, 128 tokens followed, "
        "10 % of the chunks in addition to the protected ones. The correction takes 8 of those chunks; its mean keys "
        "are extra: they are not in `KV kept`, and neither are the indexer's own keys, which take as much, or those of "
        "mean-pooled keys. The questions of that run had no beginning of an answer. Full attention then answers only 4 "
        "to 14 % of them, so they do not rank anything and are left out; the next section asks others.",
        results_tables.at_length,
    ),
    Section(
        "Gemma-3-270M: needles in text of 4K to 32K tokens",
        "needles-gemma-h200.json",
        "Recipe `gemma-3-270m-long`, in a run of its own: 56 questions per cell in the benchmark's form, on the texts' "
        "packages, 2 % of the chunks in addition to the protected ones. A correction of 8 chunks is asked where the "
        "budget buys twice as many. `KV kept` counts keys and values alone: the keys by which chunks are chosen are "
        "another 3.1 % of the cache, and as much again with a correction.",
        results_tables.needles,
    ),
    Section(
        "Which part of the quickstart's recipe matters",
        "ablations-smollm2-h200.json",
        "Every loss and option of `benchmarks/ablations.py`, trained on the same traces with one seed each, and two "
        "recipes with traces of their own: `own-answers` has labels of up to 128 tokens that the model writes "
        "itself in place of the documents' answers, `six-layers` reads layers 5, 10, 14, 18, 22 and 26. Questions "
        "are of three kinds, 24 of each a set; each kind alone is in the file. `recipe, every 16` is the recipe's "
        "indexer with a new set every 16 tokens. The recipe's loss, `bpr`, was chosen on these development "
        "documents in an earlier run. The report's documents are drawn as the quickstart's, with seeds 0 and 1, from "
        "the text that comes with that machine's Python (3.12; the quickstart's own figures are of 3.11). `bias` and "
        "`chosen-by-mass` gave the recipe's own indexer. Intervals of correlations are approximate (Fisher's z), and "
        "take the variations to be independent, which they are not. Golden recall of `golden-0.02`, `golden-0.1` and "
        "`golden-0.2` was measured by what each calls golden, which ranks nothing; it was taken out later.",
        results_tables.ablations,
    ),
    Section(
        "Which part of the quickstart's recipe matters, by rules that were written down first",
        "ablations-smollm2-cpu.json",
        "The same variations, trained and asked on a CPU, and `code` and `both`: the recipe on as many documents of "
        "`sklearn`'s source code, and on those and its own. Development: the standard library's source code. Report: "
        "that of `nltk`, `networkx` and `aiohttp`, in wordings that nothing was chosen by. Diagnoses are of the "
        "quickstart's held-out traces; those of texts and of questions alone are beside those of all. One seed each.",
        results_tables.ablations,
    ),
    Section(
        "The epochs of one training of the quickstart",
        "epochs-smollm2-cpu.json",
        "The quickstart's recipe trained once, the indexer of each epoch kept; `recipe` is the one that peak entropy "
        "chooses, of epochs 1 to 28 here and of every other one in the recipe. Development documents of the section "
        "before, diagnoses of the same held-out traces.",
        results_tables.ablations,
    ),
    Section(
        "The epochs of one training of Gemma, on short documents",
        "epochs-gemma-cpu.json",
        "Recipe `gemma-3-270m` on 40 documents of 1K to 4K tokens of `sympy` and `torch`, of which every sixth is "
        "held back and diagnoses. Development: the standard library at 4K tokens, 12 questions of each kind and 12 "
        "texts under 10 % of the chunks. `recipe` is the epoch that peak entropy chooses.",
        results_tables.ablations,
    ),
    Section(
        "Which part of Gemma's recipe matters, and a correction at equal bytes",
        "ablations-gemma-again-h200.json",
        "Recipe `gemma-3-270m-long`, trained again and with seven variations, one seed each. Development: the standard "
        "library, 24 questions of each kind under 2 % of the chunks in addition to the protected ones, and 16 texts "
        "under 10 %. Report: 30 texts a length of packages that no training read. `KV kept` counts keys and values "
        "alone. Rows `bytes of the recipe` and `bytes of the correction` keep as many more keys and values as those "
        "policies have keys to choose by. The recipe itself was chosen in the run of the next section.",
        results_tables.ablations,
    ),
    Section(
        "Which part of Gemma's recipe matters: every loss, and the options that the other runs lack",
        "ablations-gemma-options-h200.json",
        "Recipe `gemma-3-270m-long` and fourteen variations, one seed each, trained on two of its five sources (`jax` "
        "and `torch`). Development documents of seven packages: 12 questions of each kind under 2 % of the chunks in "
        "addition to the protected ones, and 12 texts under 10 %. Nothing was reported: the time on the machine was "
        "up.",
        results_tables.ablations,
    ),
    Section(
        "Which part of Gemma's recipe matters, an earlier run",
        "ablations-gemma-h200.json",
        "More variations on other documents, of 8K and 32K tokens: a third of that run's development set. Its "
        "questions had no beginning of an answer, so they are left out, and so are correlations with them.",
        results_tables.ablations_at_length,
    ),
    Section(
        "A set for each group of layers, or one for all",
        "layer-sets-cpu.json",
        "Recipe `smollm2-quickstart` on the first 19 of its 92 training documents (texts alone, traced at commit "
        "e268f4a; two of them held back), each indexer with the recipe's settings. 64 tokens of development texts are "
        "followed. `3 groups` are layers 0-9, 10-19 and 20-29. The run was stopped after 8 texts, on a machine shared "
        "with much other work: report texts and questions were not asked.",
        results_tables.layer_sets,
    ),
    Section(
        "What a set for each group of layers could gain at most",
        "layer-oracles-cpu.json",
        "Perfect foresight of each group's layers, nothing trained, on 128 tokens of 16 development texts of SmolLM2.",
        results_tables.layer_sets,
    ),
    Section(
        "A set for each of Gemma's layers, or one for all",
        "layer-sets-gemma-cpu.json",
        "Recipe `gemma-3-270m`, whose three layers with full attention are the three groups, on 20 training documents "
        "of `sympy`'s source code. 128 tokens of 16 development texts of 3K to 4K tokens are followed. Other work "
        "shared the machine.",
        results_tables.layer_sets,
    ),
    Section(
        "Gemma-3-270M up to 32K, an earlier recipe",
        "gemma-answers-h100.json",
        "`listwise_mass` with a quarter peaks, trained on up to 16K tokens; questions in the benchmark's own form, 56 "
        "per cell, and 12 texts. The command is of that commit; today `lookahead benchmark` asks such questions.",
        results_tables.answers,
    ),
    Section(
        "Gemma-3-270M up to 32K, an earlier recipe: recall at 10 % kept",
        "gemma-recall-h100.json",
        "Measured on the standard library, which that training did not read.",
        results_tables.recall,
    ),
    Section(
        "A decode step with LSA compared with full attention, at real widths",
        "decode-step-h200.json",
        "Weights and caches are random. The attention side is run; the rest of the model is estimated from the "
        "planner's operations at measured matrix rates. Requests and tokens/s are for all GPUs of the row's plan.",
        results_tables.decode_step,
    ),
    Section("Kernels of the decode runtime, on an H200", "decode-h200.json", "", results_tables.decode),
    Section("Kernels of the decode runtime, on an H100", "decode-h100.json", "", results_tables.decode),
    Section("Decoding the pocket DeepSeek-V4 at 16K", "runtime-h100.json", "", results_tables.runtime),
    Section("Decoding Gemma-3-270M at 32K", "runtime-gemma-h100.json", "", results_tables.runtime),
    Section(
        "Decoding Gemma-3-270M at 32K by a captured step",
        "runtime-graph-h200.json",
        "One sequence, a budget of 13 %. `compiled`: torch has compiled the model's norms and MLPs as well.",
        results_tables.runtime_graph,
    ),
    Section(
        "Decoding eight sequences of 32K by a captured step, and in bf16",
        "runtime-batches-h200.json",
        "A budget of 13 %; the same captured step as above, without compiled parts. The graph reads the tokens that "
        "the eager run wrote. Without a graph bf16 is slow on this host; why was not looked into.",
        results_tables.runtime_batches,
    ),
    Section(
        "Training on an H200",
        "train-h200.json",
        "H 128, R 2048, three layers, bf16, four threads. First rows: 32 cores, a decode benchmark on the other GPU. "
        "Those of a second host, 16 cores that are slower: nothing beside them.",
        results_tables.train_gpu,
    ),
    Section(
        "Evaluation on an H200 beside the same host's CPU",
        "evaluate-h200.json",
        "13 documents of 32K tokens with every baseline; `gpu_first` loads kernels. Both sides have 16 threads.",
        results_tables.evaluate_gpu,
    ),
    Section(
        "Two GPUs of one host",
        "two-gpus-h200.json",
        "Training: as many windows a step on one GPU and on two, batches made on the GPU, 64 windows a GPU. Tracing: "
        "the first six layers of DeepSeek-V4-Flash with random weights on one GPU and spread over two.",
        results_tables.two_gpus,
    ),
    Section("Training on an H100", "train-h100.json", "", results_tables.train_gpu),
    Section("Training compared with the release, on a CPU", "train-release-cpu.json", "", results_tables.train_release),
    Section(
        "The same on a CPU without AVX-512",
        "train-release-avx2.json",
        "Both cores were busy with other work; samples are counted by CPU-second.",
        results_tables.train_release,
    ),
    Section(
        "Evaluation compared with the release, on a CPU without AVX-512",
        "evaluate-release-avx2.json",
        "The same documents, weights and metrics on both sides; every token scored against all 4,096 chunks. Beside "
        "other work on both cores.",
        results_tables.evaluate_release,
    ),
    Section(
        "Tricks for the CPU, in training",
        "cpu-tricks-intel.json",
        "CPU-seconds of a step, all tricks on and all but one, in turns, beside other work; medians. 5 % is noise. "
        "oneDNN costs a little on this processor. It is used on AMD's alone, whose AVX-512 PyTorch's default library "
        "leaves unused.",
        results_tables.cpu_tricks,
    ),
    Section(
        "Keys of chunks under MLA: the mean latent, or the mean content keys of all heads",
        "mla-keys-cpu.json",
        "The pocket DeepSeek-V3.2 with its sparse attention open, which is plain MLA; chunks of 64 tokens, 40 chats "
        "trained on, 8 held out. A head makes its content key of the latent by a linear map, so that an indexer can "
        "learn of the latent whatever it could of those keys. `KL` (nats) and `same next token` are of the held-out "
        "answers, read once more with what is not resident masked, beside full attention. A tenth of such a document "
        "is one or two chunks, so that a chunk more or less shows. By all three the two keys are level to within the "
        "spread of seeds. The latent is half as wide here, a thirty-second part at DeepSeek-V3's widths (512 numbers "
        "beside 16,384): it is the key that is offered.",
        results_tables.mla_keys,
    ),
    Section(
        "Stock vLLM and the plugin, with the same pool of KV blocks",
        "serving-vllm-cpu.json",
        "Recipe `smollm2-quickstart`'s bundle; four requests of 600 to 800 tokens at once in a pool of 1,600 tokens. "
        "`visibility`: decoding reads resident blocks; `memory`: cold blocks leave the pool too. One run, beside other "
        "work on the machine; four needle questions show that retrieval works, and not a difference.",
        results_tables.serving,
    ),
    Section(
        "How fast vLLM decodes long contexts, stock and with the plugin",
        "decode-vllm-h200.json",
        "vLLM 0.26.0 from a copy of its wheel that was thinned out to what Hopper needs, FlashAttention 3 and CUDA "
        "graphs everywhere. Eight layers of Llama-3.1-8B's widths with random weights and a random indexer that keeps "
        "10 % of the blocks: what is measured is time. `stock` decodes with vLLM's newer model runner, which the "
        "plugin refuses; `stock-v1` with the plugin's, asked at 4K alone. Three calls, one after the other, on "
        "one machine.",
        results_tables.decode_vllm,
    ),
    Section(
        "How fast vLLM decodes with 32 layers, and what a step consists of",
        "decode-vllm-32-layers-h200.json",
        "The same with all 32 layers of Llama-3.1-8B's shape and a later plugin: one call, `stock` with vLLM's newer "
        "model runner. Operations are the device's under PyTorch's profiler, in a run after the one that was timed, "
        "the end of the prompts included; what a step takes beyond them is everything else. 32K tokens with 32 "
        "requests and 128K with eight do not fit beside the weights. One request at 128K was not asked.",
        results_tables.decode_vllm,
    ),
    Section(
        "The pocket DeepSeek-V4 under an eighth of its chunks",
        "pocket-table.json",
        "Recipe `pocket-v4` with `first_window: 1`, which was first tried on these questions with another bundle; "
        "nothing else was chosen on them. A chunk is four tokens.",
        pocket_table.tables,
    ),
    Section(
        "The pocket DeepSeek-V4 on text of its language",
        "pocket-text.json",
        "`lookahead decode pocket-v4-text --bundle runs/pocket/bundle --out runs/text`, the bundle of the table above.",
        results_tables.runs,
    ),
    Section(
        "A first window of one token, on the pocket DeepSeek-V4",
        "first-window-pocket.json",
        "The same bundle on the development side's questions of 1K tokens, with windows of 64 tokens alone and with a "
        "first window of one. Copies of the recipe had these files, policy and `first_window`.",
        pocket_table.tables,
    ),
    Section(
        "A first window of one token, on SmolLM2-135M",
        "first-window-smollm2.json",
        "The quickstart's recipe trained on the H200. `usual`: windows of 64 tokens; `first`: "
        "`decode.first_window: 1`. Copies of the recipes named follow 128 tokens of eight texts.",
        results_tables.runs,
    ),
    Section(
        "The pocket DeepSeek-V3.2 under an eighth of its pages",
        "pocket-dsa-table.json",
        "The recipe of `make pocket-dsa` at commit 296e5e9, on the chats and questions of that time, on the machine "
        "below, which printed the table later. A chunk is a page of 64 tokens. "
        "The indexer, the model's own indexers (`native`) and the oracle "
        "of attention choose among two to thirty-odd pages: six steps or a chain of facts rarely lie on so few, and "
        "a page's mean key holds little of a note of three words. The DSA model itself answers no whole "
        "`multi_value` and, of 16K tokens, none of the eight.",
        pocket_table.tables,
    ),
    Section("Demand fallback on the pocket model", "fallback-cpu.json", "", results_tables.fallback),
    Section(
        "Keeping by coverage or by a threshold, beside a budget that keeps as much",
        "coverage-cpu.json",
        "The bundle in `recipes/pocket_v4`. Of each length 24 texts, each asked three sparse questions (one note among "
        "many, three values of a key, a note behind an alias) and a dense one (six steps), and 24 chats, of which 128 "
        "tokens are followed. `coverage` keeps the fewest chunks whose predicted share reaches p, from the mean of the "
        "layers' logits; `sharp coverage` does so from their sum, as it is served. That budget keeps as much of all "
        "documents of a length in the mean, `budget` keeps 3 % itself; KL of a question is that of its answer's "
        "tokens. The commit was rebased before it landed, which changed none of the code that was run. The first five "
        "texts of questions at 1K and 2K had been looked at before.",
        results_tables.coverage,
    ),
    Section(
        "What grows with the number of documents",
        "scale-cpu.json",
        "Each part of `benchmarks/scale.py` by a command of its own. Opening is all that `lookahead train` does before "
        "its first step, every sixth document held back, with the files in the kernel's memory. The network file "
        "system is sshfs on this machine, through a local connection. "
        "[Traces from more than one machine](scale.md) says what follows from it.",
        results_tables.scale,
    ),
    Section(
        "The redesign: the quickstart before and after it",
        "before-after-quickstart.json",
        "Two checkouts run the same recipe, the older one's. Compared are every tensor of the traces and of the "
        "indexer, and every figure of results.json; left out are its sections `evaluated` and `measured`, which say "
        "how, where and when it was measured.",
        results_tables.before_after,
    ),
    Section(
        "The redesign: the pocket DeepSeek-V4 before and after it",
        "before-after-pocket.json",
        "The same of `make pocket`'s indexer of attention, with the answers to its 92 questions. Two calls made it: "
        "the second, on the first one's folders, timed the verbs. Beside other work.",
        results_tables.before_after,
    ),
]
"""In the order of the page; a new file in results/ joins here."""


def made(data: Row) -> str:
    """On what a file's figures were measured: a line for each command that made a part of it."""
    lines = []
    for origin in _origins(data):
        parts = [f"commit {origin['commit']}", f"{origin['device']}, {origin['cores']} cores"]
        parts += [f"{name} {origin[name]}" for name in ("python", "torch", "transformers", "vllm") if name in origin]
        lines.append(f"`{origin['command']}`; {'; '.join(parts)}.")
    return "\n\n".join(lines)


def _origins(data: Any) -> Iterator[Row]:
    """Every `benchmarks.machine.origin` that a file holds, wherever it lies."""
    if isinstance(data, dict) and "command" in data:
        yield data
    elif isinstance(data, dict | list):
        for part in data.values() if isinstance(data, dict) else data:
            yield from _origins(part)


def page() -> str:
    """The whole of docs/results.md."""
    parts = [
        "# Results",
        "Made by `python -m benchmarks.results_page` of `benchmarks/results/`: no figure in a table is typed by hand. "
        "The history lacks some of the commits named here: it has what was done between a0ac62e and df7faee as a few "
        "commits, one a subject, and other figures are of branches before they were rebased. -dirty says that files "
        "were changed and not committed. What exactly ran then cannot be looked up.",
    ]
    for section in SECTIONS:
        data = json.loads((RESULTS / section.file).read_text())
        parts += [f"## {section.title}", *([section.says] if section.says else []), made(data), *section.tables(data)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
