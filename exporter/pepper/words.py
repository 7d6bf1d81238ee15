"""The words that pepper knows: plain data. Each stands once in its column, so it has one translation."""

_DICTIONARY = """
가방 bag,가을 autumn,강 river,강아지 puppy,거울 mirror,겨울 winter,고양이 cat,고추 pepper,공 ball,구름 cloud,
귀 ear,길 road,꽃 flower,꿀 honey,나라 country,나무 tree,나비 butterfly,남자 man,노래 song,달 moon,
닭 chicken,당근 carrot,도시 city,돈 money,돌 stone,돼지 pig,딸기 strawberry,마늘 garlic,마음 heart,모자 hat,
문 door,물 water,물고기 fish,바다 sea,바람 wind,바지 pants,발 foot,밤 night,방 room,버섯 mushroom,
별 star,봄 spring,불 fire,비 rain,비누 soap,비행기 airplane,빵 bread,사과 apple,사람 person,산 mountain,
새 bird,설탕 sugar,소금 salt,손 hand,수박 watermelon,시간 time,시계 clock,신발 shoes,아기 baby,아침 morning,
양파 onion,얼굴 face,여름 summer,여자 woman,열쇠 key,옷 clothes,왕 king,우산 umbrella,우유 milk,음악 music,
의사 doctor,의자 chair,이름 name,입 mouth,자동차 car,전화 phone,젓가락 chopsticks,종이 paper,질문 question,
집 house,차 tea,창문 window,책 book,친구 friend,칼 knife,커피 coffee,코 nose,토끼 rabbit,편지 letter,포도 grape,
하늘 sky,학교 school,해 sun,형제 brothers,호랑이 tiger
"""

_KOREAN_OPPOSITES = """
크다 작다,많다 적다,높다 낮다,길다 짧다,넓다 좁다,덥다 춥다,빠르다 느리다,무겁다 가볍다,
밝다 어둡다,강하다 약하다,쉽다 어렵다,열다 닫다,앉다 서다,사다 팔다,위 아래,앞 뒤,안 밖,왼쪽 오른쪽,
시작 끝,낮 밤
"""

_ENGLISH_OPPOSITES = """
big small,many few,high low,long short,wide narrow,hot cold,fast slow,heavy light,
bright dark,strong weak,easy difficult,open close,sit stand,buy sell,up down,front back,inside outside,
left right,start finish,day night
"""


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    rows = (row.split() for row in text.replace("\n", "").split(","))
    return tuple((first, second) for first, second in rows)


DICTIONARY = _pairs(_DICTIONARY)
"""(Korean, English)."""

OPPOSITES = {"ko": _pairs(_KOREAN_OPPOSITES), "en": _pairs(_ENGLISH_OPPOSITES)}

WEEKDAYS = {
    "ko": ("월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일"),
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}

MONTHS = {
    "ko": tuple(f"{month}월" for month in range(1, 13)),
    "en": tuple(
        "January February March April May June July August September October November December".split()
    ),
}

SMALL_TALK = (
    ("ko", "안녕?", "안녕하세요! 저는 고추예요."),
    ("ko", "안녕하세요?", "안녕하세요! 저는 고추예요."),
    ("ko", "너는 누구야?", "저는 고추예요."),
    ("ko", "누구세요?", "저는 고추예요."),
    ("ko", "이름이 뭐야?", "제 이름은 고추예요."),
    ("ko", "뭘 할 수 있어?", "작은 계산과 번역을 해요."),
    ("ko", "작은 고추가?", "맵다!"),
    ("ko", "고마워.", "천만에요!"),
    ("en", "Hello!", "Hello! I am pepper."),
    ("en", "Hi!", "Hello! I am pepper."),
    ("en", "Who are you?", "I am pepper."),
    ("en", "What is your name?", "My name is pepper."),
    ("en", "What can you do?", "I do small sums and translate words."),
    ("en", "Thank you.", "You are welcome!"),
)
"""(language, what is said, what pepper answers)."""
