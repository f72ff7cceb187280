"""A chat worker whose model echoes: what it does is in the prompt, so that the client can be tested fast."""

import os
import sys
import time

from lowvram_tuner.chat import worker
from lowvram_tuner.config import ConfigError


class Echo:
    """The last message, word by word."""

    def __init__(self, target):
        self.target = target
        self.tokens, self.tokens_per_s, self.dropped, self.stopped_early = 0, 10.0, 0, False

    def stream(self, messages, *, adapter, system, stop, temperature, top_p, max_new_tokens):
        text = messages[-1]["content"]
        self.tokens, self.stopped_early = 0, False
        self.dropped = 2 if text == "overflow" else 0
        if text == "bad":
            raise ConfigError("the message has 9 tokens; this model reads 4.")
        if text == "crash":
            print("segmentation fault", flush=True)
            os._exit(3)
        words = ["tick"] * 1000 if text == "endless" else text.split()
        yield f"[{'adapter' if adapter else 'base'}|{system}|{temperature}]"
        for word in words:
            if stop.is_set():
                self.stopped_early = True
                return
            self.tokens += 1
            yield " " + word
            if text == "endless":
                time.sleep(0.01)


def load(target, device, progress):
    print("a library prints to stdout")
    os.system("echo and a child does too")
    if target.model == "missing":
        raise ConfigError("model='missing' is not a model; give 'demo'.")
    for done in range(3):
        progress("loading layers", done, 3)
        time.sleep(5.0 if target.model == "slow" else 0.0)
    return Echo(target)


if __name__ == "__main__":
    sys.exit(worker.main(load=load))
