"""What PEFT's files say, as far as it is served. For the strategies on board; no part of the contract."""
