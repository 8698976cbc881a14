"""What a reward model gives to answers that say nothing: texts made of real pairs, scored beside the real answers."""
