"""How do frozen encoders run once per picture and not once per epoch?"""
