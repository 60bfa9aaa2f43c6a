"""How calls reach the server: their kinds, the channels that carry them, retries, what fails, what is uploaded."""
