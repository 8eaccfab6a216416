// The texts of the page's frame and of the chat: key | English | Japanese. `{name}` stands for a value.
import { bilingual } from "./i18n.js";

export const strings = bilingual(String.raw`
tab.chat | Chat | チャット || tab.inside | See inside | 中を見る || tab.runs | Runs | 学習の記録
tabs | Parts of the page | ページの切り替え || model | Model | モデル || model.none | No model | モデルなし
model.embedder | {name} (embeddings) | {name}（埋め込み） || language.other | 日本語に切り替える | Switch to English
theme.system | Colours: as the system | 配色：システムに合わせる || theme.light | Colours: light | 配色：ライト
theme.dark | Colours: dark | 配色：ダーク || help | Help and keys | ヘルプとキー操作 || close | Close | 閉じる || cancel | Cancel | キャンセル
save | Save | 保存 || undo | Undo | 元に戻す || retry | Try again | 再試行 || copy | Copy | コピー
copy.code | Copy this code | このコードをコピー || list | Conversations | 会話の一覧 || chat.new | New conversation | 新しい会話
chat.running | is being answered | 回答中 || chat.rename | Rename | 名前を変更 || chat.delete | Delete | 削除
chat.deleted | “{title}” was deleted. | 「{title}」を削除しました。
chat.none | Conversations stay in this browser and are listed here. | 会話はこのブラウザーに保存され、ここに並びます。
export.one | Export this | この会話を書き出す || export.all | Export all | すべて書き出す
export.none | There is no answer to export yet. | 書き出せる回答がまだありません。 || import | Import | 読み込む
import.done | Conversations imported: {n}. | {n} 件の会話を読み込みました。
import.wrong | Line {line}: {problem} Nothing was imported. | {line} 行目：{problem}何も読み込みませんでした。
import.json | this is not JSON. | JSON ではありません。
import.messages | there is no list of “messages”. | 「messages」のリストがありません。
import.content | a message has no text in “content”. | 「content」に文章のないメッセージがあります。
import.role | roles are user, assistant and, at the start, system. | role に使えるのは user と assistant、先頭の system だけです。
you | You said | あなたの発言 || answer | Answer | 回答 || message | Write a message… | メッセージを入力… || send | Send | 送信
stop | Stop | 停止 || again | Another answer | 別の回答を生成 || edit | Edit | 編集 || go.on | Go on writing | 続きを生成
to.end | To the newest text | 末尾へ移動 || versions | Versions | バージョン || version.previous | Previous version | 前のバージョン
version.next | Next version | 次のバージョン || waiting | The model is reading. | モデルが入力を読んでいます。
writing | The model is writing. | モデルが回答を書いています。 || done | End of the answer, {n} tokens. | 回答が終わりました（{n} トークン）。
ended.length | The limit of tokens was reached. | トークン数の上限に達しました。 || ended.stopped | Stopped. | 停止しました。
ended.early | This answer was broken off. | この回答は途中で終わっています。 || speed.tokens | {n} tokens | {n} トークン
speed.rate | {n} tokens/s | 毎秒 {n} トークン || speed.read | {n} read | 入力 {n} トークン
speed.first | first after {n} s | 最初のトークンまで {n} 秒 || welcome.chat | What shall we talk about? | 何について話しましょうか
welcome.chat.about | This is {model}. What you write stays with this server. | お相手は {model} です。書いた内容はこのサーバーの外に出ません。
start.chat.1 | Explain in three sentences how a language model writes. | 言語モデルが文章を書く仕組みを 3 文で説明してください。
start.chat.2 | Write a short poem about rain on a tin roof. | トタン屋根に落ちる雨の短い詩を書いてください。
start.chat.3 | Give me three ideas for a quiet Sunday. | 静かな日曜日の過ごし方を三つ教えてください。
welcome.text | How does the text begin? | 書き出しをどうぞ
welcome.text.about | {model} does not converse: it continues what you begin. | {model} は会話用ではなく、入力された書き出しの続きを書くモデルです。
start.text.1 | Once upon a time | むかしむかし、あるところに
start.text.2 | The most important thing about learning is | 学ぶうえで最も大切なことは、
start.text.3 | It was a quiet morning, and the | 静かな朝だった。窓の外では
welcome.embedder | This model reads, but does not write. | このモデルは読むだけで、文章は書きません
welcome.embedder.about | {model} turns texts into vectors; another model can chat. | {model} は文章をベクトルにするモデルです。会話は別のモデルで。
tokens.show | Show tokens | トークンを表示 || piece.of | Tokens of the answer | 回答のトークン || piece.unlikely | surprising | 意外
piece.likely | expected | 予想どおり || piece.panel | What could have stood here | ここに来る可能性があったトークン
piece.facts | token {place} · id {id} · {share} | {place} 番目 · ID {id} · {share}
piece.previous | Previous token | 前のトークン || piece.next | Next token | 次のトークン
piece.loading | Asking the model… | モデルに問い合わせています…
piece.part | Some of a character's bytes; the tokens beside it have the rest. | 1 文字を表すバイト列の一部です。残りは隣のトークンにあります。
piece.hint | The model's own probabilities, before temperature and the like. | 温度などの設定を適用する前の、モデル自身の確率です。
piece.pick | Continue from here with “{text}” | ここから「{text}」で書き直す || piece.taken | stands in the answer | 回答で使われたトークン
settings | Settings | 設定 || system | System prompt | システムプロンプト
system.empty | What the model should know or keep to | この会話でモデルに守らせたいことなど
set.temperature | Temperature | 温度
set.temperature.hint | 0 always takes the likeliest token; more is more varied. | 0 なら常に最も確率の高いトークンを選びます。大きいほど多様になります。
set.top_p | Top-p | Top-p
set.top_p.hint | Only the likeliest tokens that together reach this; 1 is off. | 確率の上位から、合計がこの値に届くまでのトークンを使います（1 で無効）。
set.top_k | Top-k | Top-k
set.top_k.hint | Only this many of the likeliest tokens; 0 is off. | 確率の上位から、この個数のトークンだけを使います（0 で無効）。
set.min_p | Min-p | Min-p
set.min_p.hint | Only tokens with this share of the highest probability; 0 is off. | 最高の確率との比がこの値以上のトークンを使います（0 で無効）。
set.repetition_penalty | Repetition penalty | 繰り返しペナルティ
set.repetition_penalty.hint | Above 1, used tokens become less likely; 1 is off. | 1 より大きいと、既出のトークンが出にくくなります（1 で無効）。
set.max_tokens | Longest answer | 回答の長さの上限 || set.max_tokens.hint | In tokens. | トークン数で指定します。
set.max_tokens.empty | no limit | 制限なし || set.seed | Seed | シード
set.seed.hint | The same seed and settings give the same answer. | シードと設定が同じなら、同じ回答になります。
set.seed.empty | random | ランダム || set.stop | Stop at | 停止文字列
set.stop.hint | The answer ends before these texts, one a line; \n is a line end. | この文字列の手前で回答を終えます。1 行に一つずつ、\n は改行です。
set.reset | Back to the defaults | 既定値に戻す || key.title | This server wants a key | このサーバーにはキーが必要です
key.about | It goes to this server only and is forgotten when this tab is closed. | キーはこのサーバーだけに送られ、タブを閉じると破棄されます。
key.wrong | That key was refused. Try another one. | キーが正しくありません。別のキーを入力してください。 || key.label | API key | API キー
error.unreachable | The server cannot be reached. Is it still running? | サーバーに接続できません。サーバーが動いているか確かめてください。
error.broken | The connection broke off in the middle of the answer. | 回答の途中で接続が切れました。
error.status | The server answered with the status {status}. | サーバーがステータス {status} を返しました。
error.key | The server wants a valid key. | 有効なキーが必要です。
error.busy | The server has too much to do. Try again in {seconds} s. | サーバーが混み合っています。{seconds} 秒ほど待ってからやり直してください。
error.odd | The answer could not be read ({what}). | 回答を読み取れませんでした（{what}）。
error.full | The browser has no room for this: export it, or delete others. | 保存領域が足りません。この会話を書き出すか、ほかを削除してください。
`);
