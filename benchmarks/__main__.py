"""`python -m benchmarks`: all topics."""

from benchmarks import accelerators, accuracy, attention, calibration, compile, losses, mappings
from benchmarks.command import main

TOPICS = tuple(
    module.TOPIC
    for module in (mappings, losses, attention, calibration, compile, accuracy, accelerators)
)

if __name__ == "__main__":
    main(TOPICS)
