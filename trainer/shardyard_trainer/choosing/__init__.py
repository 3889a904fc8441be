"""Which model to train for a task: a catalogue as data, the project's own models, and an explicit ranking."""
