"""What is done with a chain of thought while it is written: loops are found, and concluded."""
