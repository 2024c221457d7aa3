"""Where a trial runs is not the search's business."""
