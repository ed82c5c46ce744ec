"""The processes that train together: their groups, what each has of the model, and what they tell each other."""
