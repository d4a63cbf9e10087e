"""The parts of `WeightSender`: the trainer's ranks, its engines, the report, the progress bar."""
