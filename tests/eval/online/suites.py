"""Rows of our own in the formats of kvpress, SCBench, BABILong, GraphWalks and HELMET, two of each."""

STORY = "The ferry leaves at nine. Ada keeps the red key 4417 in the boathouse. Bo paints the fence. "
KVPRESS = [
    {
        "context": f"A magic number is hidden here. {STORY}",
        "question": "What is the number of the red key?\n",
        "answer_prefix": " The number is",
        "answer": ["4417"],
        "task": "niah_single_1",
        "max_new_tokens": 12,
    },
    {
        "context": f"Here are kinds of questions.\n{STORY}",
        "question": "Question: Where is the key?\n",
        "answer_prefix": "Type:",
        "answers": ["LOC"],
        "all_classes": ["LOC", "NUM", "HUM"],
        "length": 30,
        "task": "trec-e",
        "max_new_tokens": 84,
    },
]
SCBENCH = [
    {
        "id": 0,
        "context": '{"k1": "v-417", "k2": "v-982"} ' + STORY,
        "multi_turns": [
            {"input": 'Key: "k1"', "answer": "v-417"},
            {"input": 'Key: "k2"', "answer": "v-982"},
        ],
    },
    {"id": 1, "input": '{"a": "b"} ' + STORY, "multi_turns": [{"input": 'Key: "a"', "answer": "b"}]},
]
BABILONG = [
    {"input": f"{STORY}Mary went to the garden.", "question": "Where is Mary? ", "target": "garden"},
    {"input": f"John is in the office. {STORY}", "question": "Where is John? ", "target": "office"},
]
GRAPHWALKS = [
    {
        "prompt": "Edges:\naa -> bb\naa -> cc\nbb -> dd\nWalk one step from aa.",
        "answer_nodes": ["bb", "cc"],
        "prompt_chars": 60,
        "problem_type": "bfs",
    },
    {"prompt": "Edges:\naa -> bb\nWho leads to aa?", "answer": [], "prompt_chars": 30, "problem_type": "parents"},
]
HELMET_KV = [
    {
        "context": '{"k1": "u-1", "k2": "u-2", "k3": "u-3", "k4": "u-4"}',
        "question": key,
        "answer": value,
        "demos": [["k3", "u-3"], ["k4", "u-4"], ["k9", "u-9"]],
        "num_kvs": 4,
    }
    for key, value in (("k1", "u-1"), ("k2", "u-2"))
]
HELMET_RAG = [
    {
        "question": "Who keeps the key?",
        "answers": ["Ada", "Ada Byron"],
        "ctxs": [{"title": "Boats", "text": STORY}, {"title": "Fences", "text": "Bo paints."}],
    },
    {"question": "Who paints?", "answers": [["Bo"], ["Bob"]], "ctxs": [{"title": "Fences", "text": "Bo paints."}]},
]
SUITES = {
    "kvpress": ("data.json", KVPRESS),
    "scbench": ("scbench_kv.jsonl", SCBENCH),
    "babilong": ("qa1.json", BABILONG),
    "graphwalks": ("data.json", GRAPHWALKS),
    "helmet-kv": ("json_kv.jsonl", HELMET_KV),
    "helmet-rag": ("nq.jsonl", HELMET_RAG),
}
"""Format -> (a name that its file may have, rows)."""
