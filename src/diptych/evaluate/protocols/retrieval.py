"""Protocol `retrieval`: captions among images and images among captions (Table 13)."""

from typing import cast

import torch

from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.measures import wilson_interval
from diptych.evaluate.protocols.task import Arrays, ProtocolSpec, Task
from diptych.evaluate.results import Result

KS = (1, 5, 10)


def retrieve(task: Task) -> tuple[Result, Arrays]:
    """Table 13: captions among pictures and pictures among captions."""
    test = task.test
    captions = [cast(tuple[str, ...], test.samples.labels[i]) for i in test.embedded.kept]
    texts = [task.used.prefix + caption for several in captions for caption in several]
    of_text = torch.tensor([i for i, several in enumerate(captions) for _ in several])
    features = task.embed_texts(texts)
    found = dict(measures.retrieval(test.embedded.joint, features, KS, image_of_text=of_text))
    trials = {"image": len(texts), "text": len(captions)}
    intervals = {name: wilson_interval(value, trials[name.split("_")[0]]) for name, value in found.items()}
    found["mean_recall@1"] = (found["image_retrieval_recall@1"] + found["text_retrieval_recall@1"]) / 2
    details = {"captions": len(texts), "prefix": task.used.prefix, "intervals": intervals}
    result = task.result("retrieval", "mean_recall@1", found["mean_recall@1"], metrics=found, details=details)
    return result, {}


SPEC = ProtocolSpec(kinds=("captions",), measure=retrieve)
