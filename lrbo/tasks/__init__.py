"""What a good model is: a loss, its gradient, and what is measured."""
