"""Hand-over of the whole state from a gate process to the next."""
