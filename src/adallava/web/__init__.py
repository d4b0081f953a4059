"""The demo page: a picture, a question and a budget, and what runs for them."""
