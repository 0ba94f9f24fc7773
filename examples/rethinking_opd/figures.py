"""The runs and the figures, as data: what is trained from what, and what is compared.

A figure is a few arms that differ in the one thing which the figure is about.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One training run.

    `start` and `teacher` name runs, or `start` a network that gets random weights; without a
    teacher the run is supervised. `data` and `held_out` are files that `skills.write_data` writes;
    `data` may also be `written:RUN`, the responses of a model to cold.jsonl.
    """

    start: str
    data: tuple[str, ...] = ("sums",)
    teacher: str = ""
    settings: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ("sums",)


@dataclass(frozen=True)
class Figure:
    """What is shown: the title, where the paper has it, the arms by label, the held-out files.

    `order`: also the share of the last responses that work from the left.
    """

    title: str
    paper: str
    arms: dict[str, str]
    files: tuple[str, ...] = ("sums",)
    order: bool = False


# the authors' form: log-probabilities of the vocabulary, weights that add up to 1 on the support
AUTHORS = ("objective.normalize=vocab", "objective.form=policy_gradient")
RAW = "objective.reward_weight_normalize=false"  # how it weighs the non-overlap
WEAK = ("train.prompts_per_step=64", "train.steps=120", "optimizer.schedule=constant")
# for models that are trained already, which a rate for beginners would set back first
GENTLY = "optimizer.lr=5.0e-4"
MORE = ("student.init=hf", "train.prompts_per_step=64", "train.steps=60", "optimizer.lr=1.0e-3")
CARRYING = ("sums", "plain")
BOTH, TEMPLATES, MEMORY = ("sums", "differences"), ("sums", "words"), ("facts", "sums")
READ = (*MORE, "train.steps=150")


def opd(*settings: str, start: str = "start", teacher: str = "teacher", **more) -> Run:
    """Return a distillation."""
    return Run(start, teacher=teacher, settings=settings, **more)


RUNS: dict[str, Run] = {
    # what figures share
    "teacher": Run("big", held_out=("sums", "differences", "facts")),
    "start": Run("small", settings=WEAK),
    "left_teacher": Run("big", settings=("data.response_key=left",)),
    "opd": opd(),
    # support, k: Eq. 5, and as the authors' code has it
    "overlap_eq5": opd("objective.support=intersection"),
    "rest_eq5": opd("objective.support=union-intersection"),
    "topk": opd(*AUTHORS),
    "overlap": opd("objective.support=intersection", *AUTHORS),
    "rest": opd("objective.support=union-intersection", RAW, *AUTHORS),
    "k2_eq5": opd("objective.k=2"),
    "k16_eq5": opd("objective.k=16"),
    "k1": opd("objective.k=1", *AUTHORS),
    "k2": opd("objective.k=2", *AUTHORS),
    "k16": opd("objective.k=16", *AUTHORS),
    "sampled": opd("objective.support=sampled", "objective.form=policy_gradient"),
    # patterns, cold_start
    "from_left": opd(teacher="left_teacher"),
    "from_left_longer": opd("train.steps=140", teacher="left_teacher"),
    "cold": Run("start", ("written:left_teacher",), settings=(*MORE, "data.response_key=response")),
    "cold_then_opd": opd(start="cold", teacher="left_teacher"),
    # knowledge: carrying
    "plain_start": Run("small", ("plain",), held_out=CARRYING),
    "plain_teacher": Run("big", ("plain",), held_out=CARRYING),
    "carries": Run("plain_teacher", settings=("student.init=hf",), held_out=CARRYING),
    "from_plain": opd(start="plain_start", teacher="plain_teacher", held_out=CARRYING),
    "from_carries": opd(start="plain_start", teacher="carries", held_out=CARRYING),
    "from_plain_k16": opd(
        "objective.k=16", start="plain_start", teacher="plain_teacher", held_out=CARRYING
    ),
    "from_carries_k16": opd(
        "objective.k=16", start="plain_start", teacher="carries", held_out=CARRYING
    ),
    # new_skill
    "same_data": Run("small", held_out=BOTH),
    "knows_more": Run("teacher", BOTH, settings=("student.init=hf",), held_out=BOTH),
    "from_same": opd(GENTLY, start="same_data", data=BOTH, held_out=BOTH),
    "from_more": opd(GENTLY, start="same_data", teacher="knows_more", data=BOTH, held_out=BOTH),
    # reverse
    "bigger_weak": Run("big", settings=WEAK),
    "to_ancestor": opd(GENTLY, start="opd", teacher="start"),
    "to_bigger_weak": opd(GENTLY, start="opd", teacher="bigger_weak"),
    # templates
    "start_of_two": Run("small", TEMPLATES, settings=WEAK, held_out=TEMPLATES),
    "bigger_of_two": Run("big", TEMPLATES, held_out=TEMPLATES),
    "teacher_of_one": Run("bigger_of_two", settings=MORE, held_out=TEMPLATES),
    "aligned": opd(start="start_of_two", teacher="teacher_of_one", held_out=TEMPLATES),
    "not_aligned": opd(
        start="start_of_two", teacher="teacher_of_one", data=("words",), held_out=TEMPLATES
    ),
    # length
    **{f"cut_{n}": opd(f"rollout.max_tokens={n}", "eval.max_tokens=40") for n in (4, 8, 16, 24)},
    # single_prompt
    "many": opd(GENTLY),
    "one_a_step": opd(GENTLY, "data.schedule=one_per_batch"),
    "one_for_all": opd(GENTLY, "data.schedule=one_total"),
    # forgetting
    "read": Run("teacher", ("facts",), settings=READ, held_out=MEMORY),
    "read_both": Run("teacher", ("facts_and_sums",), settings=READ, held_out=MEMORY),
    "read_cured": opd(GENTLY, start="read", held_out=MEMORY),
    "read_both_cured": opd(GENTLY, start="read_both", held_out=MEMORY),
}

FIGURES: dict[str, Figure] = {
    "support": Figure(
        "Which entries carry the signal",
        "Fig. 7",
        {
            "student's top 4": "opd",
            "overlap": "overlap_eq5",
            "non-overlap": "rest_eq5",
        },
    ),
    "support_code": Figure(
        "The same with the authors' un-centred coefficients",
        "Fig. 7",
        {"student's top 4": "topk", "overlap": "overlap", "non-overlap": "rest"},
    ),
    "k": Figure(
        "How many entries are compared",
        "Figs. 15 and 16",
        {
            "k = 2, Eq. 5": "k2_eq5",
            "k = 4, Eq. 5": "opd",
            "k = 16, Eq. 5": "k16_eq5",
            "k = 1, code": "k1",
            "k = 2, code": "k2",
            "k = 4, code": "topk",
            "k = 16, code": "k16",
            "sampled": "sampled",
        },
    ),
    "patterns": Figure(
        "Two teachers that score alike: one thinks as the student does, one does not",
        "Fig. 2",
        {"compatible": "opd", "incompatible": "from_left"},
        order=True,
    ),
    "knowledge": Figure(
        "A bigger teacher of the same data, which has no carry, and one that learned to carry",
        "Fig. 4",
        {
            "same data, bigger": "from_plain",
            "knows more": "from_carries",
            "same data, bigger, k = 16": "from_plain_k16",
            "knows more, k = 16": "from_carries_k16",
        },
        CARRYING,
    ),
    "new_skill": Figure(
        "The same with knowledge of which the student has not even a beginning",
        "Fig. 4",
        {"same data, bigger": "from_same", "knows more": "from_more"},
        BOTH,
    ),
    "reverse": Figure(
        "A strong student and the weak models that it comes from",
        "Fig. 5",
        {"towards its ancestor": "to_ancestor", "towards a bigger weak one": "to_bigger_weak"},
    ),
    "cold_start": Figure(
        "A cold start on the responses of an incompatible teacher",
        "Fig. 8",
        {
            "OPD alone, 80 steps": "from_left",
            "OPD alone, 140 steps": "from_left_longer",
            "cold start, 60 steps": "cold",
            "cold start, then OPD, 80 steps": "cold_then_opd",
        },
        order=True,
    ),
    "templates": Figure(
        "The teacher's template, and another",
        "Fig. 9",
        {"347+285=": "aligned", "add 347 285:": "not_aligned"},
        TEMPLATES,
    ),
    "length": Figure(
        "How much of a response is written and supervised",
        "Fig. 11",
        {**{f"{n} tokens": f"cut_{n}" for n in (4, 8, 16, 24)}, "40 tokens": "opd"},
    ),
    "single_prompt": Figure(
        "128 responses a step, to many prompts or to one",
        "slides, single-prompt distillation",
        {"64 a step": "many", "one a step": "one_a_step", "one for all": "one_for_all"},
    ),
    "forgetting": Figure(
        "New facts, what they cost, and the original as the teacher",
        "continual-learning table",
        {
            "facts": "read",
            "facts, then OPD": "read_cured",
            "facts and sums": "read_both",
            "facts and sums, then OPD": "read_both_cured",
        },
        MEMORY,
    ),
}
