"""From a point to an allocation, and which point comes next."""
