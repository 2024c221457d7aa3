"""From predicted losses and a budget to one option per unit."""
