"""Texts for the tokenizer's tests: mixed_text() and the lists that it is made of."""

import pathlib
import random

# Article 1 of the Universal Declaration of Human Rights, in several scripts.
PROSE = [
    "All human beings are born free and equal in dignity and rights. They are endowed with reason "
    "and conscience and should act towards one another in a spirit of brotherhood. It's what we've "
    "said; they'll agree, I'd think, and you're right: don't ask who'S first.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están "
    "de razón y conciencia, deben comportarse fraternalmente los unos con los otros. ¿Qué más?",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Größe, Straße, GROẞ, ﬁn.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلًا وضميرًا ١٢٣٤٥",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. בְּרֵאשִׁית",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३४",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் "
    "மதிப்பிலும் உரிமைகளிலும் சமமானவர்கள்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓",
    "ሰው፡ሁሉ፡ሲወለድ፡ነጻና፡በክብርና፡በመብትም፡እኩልነት፡ያለው፡ነው።",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。ﾊﾝｶｸ　全角",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ᠬᠦᠮᠦᠨ ᠪᠦᠷ ᠲᠥᠷᠥᠵᠦ ᠮᠡᠨᠳᠡᠯᠡᠬᠦ ᠡᠷᠬᠡ ᠴᠢᠯᠥᠭᠡ ᠲᠡᠢ᠂ ᠠᠳᠠᠯᠢᠬᠠᠨ᠎ᠠ ᠨᠡᠷ᠎ᠡ ᠲᠥᠷᠥ",
]

CODE = [
    "for (int i = 0; i < 1'000; ++i) {\n\tsum += values[i] * 0x1F;  // don't\n}\n",
    "def f(x: int = 3) -> str:\n    return f'{x!r:>10}' if x else \"\\n\\t\"\r\n",
    "SELECT a.id, COUNT(*) FROM t AS a WHERE a.x >= 1e-5 GROUP BY 1;\n\n\n",
    "<p class=\"note\">&amp; https://example.org/a?b=1&c=%20#d</p>\n",
    "{\"key\": [1, 2.50, -3e+10, null, true], \"\\u00e9\": \"\"}\n",
    "$ ls -la | grep '^d' && echo \"${HOME}\" > /dev/null 2>&1\n",
]

EMOJI = [
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇯🇵", "❤️", "1️⃣", "🧑🏿‍🚀",
    "\U0001fae8", "\U0001fadc", "☃", "⌨️",
]

SPECIAL_TEXTS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<tool_call>", "</tool_call>", "<|im_start", "im_end|>", "<|", "|>",
    "<|im_end|><|im_end|>", " <|im_start|>user\n", "<s>", "[MASK]", "e\u0301<|im_end|>\u0301",
]

SPACES = [
    " ", "  ", "   ", "\t", "\t\t ", "\n", "\n\n", "\r\n", " \n ", "\n   \n", "\v", "\f", "\x85",
    "\xa0", "\u1680", "\u180e", "\u2003 \u2009", "\u200b", "\u2028", "\u2029", "\u202f", "\u3000",
    "\ufeff", "   \r\n\t x",
]

MARKS = [
    "e\u0301", "o\u0308\u0323", "o\u0323\u0308", "n\u0303", "\u212b", "\uac00\u11a8",
    "\u1100\u1161",
    "q\u0307\u0323", "\u0958", "a\u0345\u0300", "\u0f73\u0f71", "\u1e9b\u0323", "\u2126", "\ufb01",
    "a\u1df6\u0323", "a\u0300\u0898\u0323", "\u2adc", "\U0001d15f", "\U00011935\U00011930",
    "\u0cc6\u0cd5",
]

CONTRACTIONS = [
    "I'M", "we'Ll", "it'\u017f", "'\u017f", "\u2019s", "'tis", "x'd'll've", "'RE", "'s's's",
    "'' 'm",
]

NUMBERS = [
    "0", "12", "123", "1234", "1234567890", "3.14159", "1,234.56", "²³¼½", "Ⅻ", "٣٤٥", "१२३", "𝟘𝟙𝟚",
    "①②③", "\U00010d40\U00010d41", "\U00011de0", "\U0001ccf0\U0001ccf1", "x1y22z333",
]


def random_characters(random_source, num):
    """Characters of all planes that have any, half of them with a small code point."""
    ranges = [
        (0x00, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x14FFF),
        (0x16000, 0x18FFF), (0x1B000, 0x1FFFF), (0x20000, 0x323FF), (0xE0000, 0xE01FF),
        (0x0, 0x2FF),
    ]
    return "".join(chr(random_source.randint(*random_source.choice(ranges))) for _ in range(num))


def every_character():
    """All of Unicode except the empty planes and the surrogates, each in two surroundings."""
    planes = [(0x0, 0xD800), (0xE000, 0x1B000 + 0x5000), (0x20000, 0x20100), (0x2A6D0, 0x2A710),
              (0x2B730, 0x2B750), (0x2EBE0, 0x2EE70), (0x31340, 0x323C0), (0xE0000, 0xE0200)]
    return [chr(c) for first, end in planes for c in range(first, end)]


def repository_code(num_bytes):
    """Sources of this repository, at most num_bytes."""
    root = pathlib.Path(__file__).resolve().parents[2]
    text = ""
    sources = [path for name in ("*/*.h", "*/*.cc", "*/*.py") for path in sorted(root.glob(name))]
    for path in sources:
        text += path.read_text(encoding="utf-8")
        if len(text) >= num_bytes:
            break
    return text[:num_bytes]


def debian_prose(num_bytes):
    """The GPL-3 as Debian ships it; nothing elsewhere."""
    path = pathlib.Path("/usr/share/common-licenses/GPL-3")
    return path.read_text(encoding="utf-8")[:num_bytes] if path.exists() else ""


def mixed_text(seed, num_bytes):
    """About num_bytes of everything above."""
    source = random.Random(seed)
    words = [word for sentence in PROSE for word in sentence.split(" ")]
    makers = [
        lambda: source.choice(PROSE),
        lambda: " ".join(source.choices(words, k=12)),
        lambda: source.choice(CODE),
        lambda: "".join(source.choices(EMOJI, k=4)),
        lambda: source.choice(SPECIAL_TEXTS),
        lambda: "".join(source.choices(SPACES, k=3)),
        lambda: "".join(source.choices(MARKS, k=4)),
        lambda: "".join(source.choices(CONTRACTIONS, k=2)),
        lambda: " ".join(source.choices(NUMBERS, k=3)),
        lambda: random_characters(source, 12),
        lambda: "".join(chr(source.randint(0, 0x9F)) for _ in range(12)),
        lambda: source.choice("aé中 -=\t\n") * source.randint(1, 120),
    ]
    parts, size = [], 0
    while size < num_bytes:
        part = source.choice(makers)() + source.choice(["", " ", "\n", " "])
        parts.append(part)
        size += len(part.encode())
    return "".join(parts)
