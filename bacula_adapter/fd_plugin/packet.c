/* SPDX-License-Identifier: AGPL-3.0-or-later */
#include "packet.h"

#include <string.h>

bool packet_decode(const unsigned char bytes[HEADER_BYTES], struct packet_header *header)
{
    uint32_t length = 0;
    for (size_t i = 1; i < HEADER_BYTES - 1; i++) {
        if (bytes[i] < '0' || bytes[i] > '9')
            return false;
        length = length * 10U + (uint32_t)(bytes[i] - '0');
    }
    if (bytes[HEADER_BYTES - 1] != '\n')
        return false;
    header->status = (char)bytes[0];
    header->length = length;
    switch (header->status) {
    case 'F':
    case 'K':
        return length == 0;
    case 'B':
        return length > ADDRESS_BYTES;
    case 'C':
    case 'D':
    case 'E':
    case 'A':
    case 'Q':
    case 'W':
    case 'I':
        return true;
    default:
        return false;
    }
}

void packet_encode(unsigned char bytes[HEADER_BYTES], char status, size_t length)
{
    bytes[0] = (unsigned char)status;
    for (size_t i = HEADER_BYTES - 2; i >= 1; i--) {
        bytes[i] = (unsigned char)('0' + length % 10U);
        length /= 10U;
    }
    bytes[HEADER_BYTES - 1] = '\n';
}

uint64_t address_decode(const unsigned char bytes[ADDRESS_BYTES])
{
    uint64_t address = 0;
    for (size_t i = 0; i < ADDRESS_BYTES; i++)
        address = address << 8 | bytes[i];
    return address;
}

void address_encode(unsigned char bytes[ADDRESS_BYTES], uint64_t address)
{
    for (size_t i = 0; i < ADDRESS_BYTES; i++)
        bytes[i] = (unsigned char)(address >> (8U * (ADDRESS_BYTES - 1U - i)) & 0xFFU);
}

/* Bytes of the UTF-8 character that begins here, 0 if there is none. */
static size_t character_bytes(const unsigned char *text, size_t length)
{
    static const struct {
        unsigned char first, last, second_min, second_max;
        size_t bytes;
    } forms[] = {
        /* The Unicode standard's table of well-formed sequences. */
        {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3}, {0xE1, 0xEC, 0x80, 0xBF, 3},
        {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3}, {0xF0, 0xF0, 0x90, 0xBF, 4},
        {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4},
    };
    if (text[0] < 0x80)
        return 1;
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        if (text[0] < forms[i].first || text[0] > forms[i].last)
            continue;
        if (length < forms[i].bytes || text[1] < forms[i].second_min || text[1] > forms[i].second_max)
            return 0;
        for (size_t k = 2; k < forms[i].bytes; k++) {
            if (text[k] < 0x80 || text[k] > 0xBF)
                return 0;
        }
        return forms[i].bytes;
    }
    return 0;
}

static bool is_control(unsigned char byte)
{
    return byte < 0x20 || byte == 0x7F;
}

static size_t trimmed(const char *text, size_t length)
{
    while (length > 0 && (text[length - 1] == ' ' || (text[length - 1] >= '\t' && text[length - 1] <= '\r')))
        length--;
    return length;
}

void message_clean(char *text, size_t length)
{
    length = trimmed(text, length);
    size_t at = 0;
    while (at < length) {
        size_t bytes = character_bytes((const unsigned char *)text + at, length - at);
        if (bytes > MESSAGE_MAX - at)
            break;
        if (bytes == 0 || is_control((unsigned char)text[at])) {
            if (at == MESSAGE_MAX)
                break;
            text[at] = '?';
            bytes = 1;
        }
        at += bytes;
    }
    text[at] = '\0';
}

bool command_trim(char *text, size_t length)
{
    length = trimmed(text, length);
    text[length] = '\0';
    for (size_t i = 0; i < length; i++) {
        if (is_control((unsigned char)text[i]))
            return false;
    }
    return true;
}

bool after(const char *text, const char *prefix, const char **rest)
{
    size_t length = strlen(prefix);
    if (strncmp(text, prefix, length) != 0)
        return false;
    *rest = text + length;
    return true;
}

/* Takes a number of the base off the front of *text. */
static bool take_number(const char **text, unsigned base, uint64_t max, uint64_t *number)
{
    const char *at = *text;
    uint64_t value = 0;
    for (; *at >= '0' && *at < (char)('0' + base); at++) {
        unsigned digit = (unsigned)(*at - '0');
        if (value > (max - digit) / base)
            return false;
        value = value * base + digit;
    }
    if (at == *text || value > max)
        return false;
    *text = at;
    *number = value;
    return true;
}

static bool take_blank(const char **text)
{
    if (**text != ' ')
        return false;
    (*text)++;
    return true;
}

bool number_parse(const char *text, uint64_t max, uint64_t *number)
{
    return take_number(&text, 10, max, number) && *text == '\0';
}

bool stat_parse(const char *text, struct file_facts *facts)
{
    uint64_t size, uid, gid, mode, links, index;
    char kind = text[0];
    if (kind != 'F' && kind != 'E' && kind != 'D')
        return false;
    text++;
    if (!take_blank(&text) || !take_number(&text, 10, INT64_MAX, &size) || !take_blank(&text) ||
        !take_number(&text, 10, UINT32_MAX, &uid) || !take_blank(&text) ||
        !take_number(&text, 10, UINT32_MAX, &gid) || !take_blank(&text) || !take_number(&text, 8, 0177777, &mode) ||
        !take_blank(&text) || !take_number(&text, 10, UINT32_MAX, &links))
        return false;
    if (*text == ' ' && (!take_blank(&text) || !take_number(&text, 10, INT32_MAX, &index)))
        return false;
    if (*text != '\0')
        return false;
    facts->kind = kind;
    facts->size = (int64_t)size;
    facts->uid = (uint32_t)uid;
    facts->gid = (uint32_t)gid;
    facts->mode = (uint32_t)mode & 07777U;
    return true;
}

bool times_parse(const char *text, struct file_facts *facts)
{
    /* Seconds that every calendar can still show. */
    const uint64_t max = INT64_C(253402300799);
    uint64_t times[3];
    for (size_t i = 0; i < 3; i++) {
        if ((i > 0 && !take_blank(&text)) || !take_number(&text, 10, max, &times[i]))
            return false;
    }
    if (*text != '\0')
        return false;
    facts->atime = (int64_t)times[0];
    facts->mtime = (int64_t)times[1];
    facts->ctime = (int64_t)times[2];
    return true;
}
