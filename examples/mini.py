"""A whole application: greetings in, shouted greetings out. Try it: flowkit dev mini:app"""

from flowkit import Flowkit

app = Flowkit("mini", kafka={"hosts": "127.0.0.1:9092"}, inline=True)


@app.topic("greetings")
@app.responds_to("shouts")
def shout(greeting: str) -> str:
    return greeting.upper() + "!"
