// The texts of See inside and Runs: key | English | Japanese. A line that is indented goes on with the one before.
import { bilingual } from "./i18n.js";

export const strings = bilingual(String.raw`
inside.text | Text to look into | 調べる文章
inside.example | The capital of Japan is Tokyo.\n日本の首都は東京です。 | 日本の首都は東京です。\nThe capital of Japan is Tokyo.
inside.look | See inside | 中を見る || inside.from.chat | Take the conversation from the chat | チャットの会話を使う
inside.view.tokens | Tokens | トークン || inside.view.alternatives | Next tokens | 次のトークン
inside.view.attention | Attention | 注意機構 || inside.view.lens | Layer by layer | 層ごとの予測
inside.view.neighbours | Neighbours | 近いトークン || inside.docs | How the code computes this | この計算をするコードの説明
inside.empty | Write a text and choose “See inside”. | 文章を入力して「中を見る」を押してください。 || inside.busy | Computing … | 計算しています…
inside.not.writer | An embedding model reads a whole text at once and writes none: there is no next token to show.
  | これは埋め込みモデルです。文章全体を一度に読むだけで、続きを書かないため、ここに示す「次のトークン」がありません。
inside.token | Token {position}: “{text}”, id {id} | {position} 番目のトークン：「{text}」、ID {id}
inside.range | Of {count} tokens: | 全 {count} トークンのうち： || inside.from | from | 開始 || inside.to | to | 終了
inside.cut | Read are at most {limit} tokens, up to the last one shown. | 表示する最後のトークンまで、最大 {limit} トークンをモデルが読みます。
tokens.about | A model works on numbers, so its tokenizer cuts the text into pieces of its vocabulary, each with an
  id. The fewer pieces a text needs, the more of it fits into the context.
  | モデルが扱うのは数なので、トークナイザーが文章を語彙にある断片に区切り、それぞれを ID に置き換えます。断片の数が少ないほど、多くの文章が文脈に収まります。
tokens.count | {tokens} tokens for {characters} characters: {ratio} characters per token
  | {characters} 文字が {tokens} トークン（1 トークンあたり {ratio} 文字）
alternatives.about | After each token the model gives every piece of its vocabulary a probability of coming next; the
  colours show that of the one written. Choose a token to see what else could have come, and another to go on from it.
  | モデルはトークンを一つ書くたびに、語彙のすべてのトークンについて「次に来る確率」を求めます（色の濃さは、書かれたトークンの確率です）。トークンを選ぶと候補が表示され、別の候補を選ぶとそこから続きを書き直します。
alternatives.more | Write {count} more tokens | 続きを {count} トークン生成 || alternatives.anew | Start again | 最初からやり直す
alternatives.ended | The model ended its text here. | モデルはここで文章を終えました。
alternatives.of | In place of token {position} “{text}” | {position} 番目のトークン「{text}」の候補
attention.about | Every token gathers what it needs from others: each row of the map shares 100 % out among the tokens
  it looks at. Every head of every layer has learned to look for something else.
  | 注意機構では、それぞれのトークンがほかのトークンから必要な情報を集めます（図の各行は、どのトークンをどれだけ見るかの割合で、合計は 100 % です）。どの層のどのヘッドも、それぞれ違うものに注目するように学習されています。
attention.choose | Layer | 層 || attention.layer | {layer} of {layers} | {layer} / {layers}
attention.heads | Heads of this layer | この層のヘッド || attention.head | Head {head} | ヘッド {head}
attention.from | Where does this token look? | このトークンはどこを見ているか
attention.map | Attention map: rows look at columns; move with the arrow keys | 注意のヒートマップ。行が見る側、列が見られる側。矢印キーで移動
attention.readout | Head {head}: “{from}” → “{to}”: {share} | ヘッド {head}：「{from}」→「{to}」 {share}
attention.hint | Rows look at columns; colour is the share’s square root. Choose a token, point, or use the arrow keys.
  | 行が見る側、列が見られる側のトークンです。小さな値も見えるように、色の濃さは割合の平方根に比例させています。トークンを選ぶか、図にポインターを重ねるか、矢印キーを押すと、その値が表示されます。
lens.about | The logit lens reads the state after every layer as if it were the last, and asks which token comes next.
  In early layers the guess is vague; towards the end the answer takes shape.
  | ロジットレンズは、各層を通った直後の状態を最後の層の出力とみなして、次に来るトークンを予測させます。浅い層では予測がまだ定まらず、深い層へ進むにつれてモデルの答えが形になっていきます。
lens.embedding | Embedding | 埋め込み || lens.cell | Layer {layer}: {text}, {share} | 層 {layer}：{text}、{share}
lens.title | Layer {layer}, after token {position} “{text}” | 層 {layer}、{position} 番目のトークン「{text}」の次
lens.hint | The stronger the colour, the surer the guess; framed: the token that does come next in the text. Choose a
  cell for its five likeliest. | 色が濃いほど確率の高い予測です。枠で囲んだマスは、文章で実際に次に来るトークンと一致した予測です。マスを選ぶと、上位 5 個の候補が表示されます。
neighbours.about | Every token of the vocabulary is a vector in the model’s embedding; tokens used alike point alike.
  These point most nearly the same way as the chosen one (cosine 1: the very same way).
  | 語彙のトークンはそれぞれ、モデルの埋め込みの中の一つのベクトルで、使われ方の似たトークンは向きも似ています。ここには、選んだトークンと向きの近いものが並びます（コサイン類似度 1 で同じ向き）。
neighbours.other | Or another token | 別のトークンを調べる || neighbours.trail | Visited so far | たどった順
neighbours.of | Neighbours of “{text}” (id {id}) | 「{text}」（ID {id}）に近いトークン
runs.show | Show | 表示 || runs.name | Run | 記録 || runs.state | State | 状態 || runs.steps | Step | ステップ
runs.val_loss | Validation loss | 検証損失 || runs.updated | Last change | 最終更新 || runs.running | running | 学習中
runs.finished | finished | 終了
runs.empty | No run folder yet. “scratchlm pretrain --data TEXT --out runs/NAME” makes one, and it appears here while
  it trains. | まだ学習の記録がありません。「scratchlm pretrain --data TEXT --out runs/NAME」で学習を始めると、途中経過がここに表示されます。
runs.log | Logarithmic loss | 損失を対数で表示 || runs.smooth | Smoothing | 平滑化 || runs.reset | Show all steps | 全体を表示
runs.refresh | Look again | 更新
runs.chart | Loss by step: arrow keys move, + and - zoom, Escape shows all | ステップごとの損失。矢印キーで移動、+ と - で拡大と縮小、Esc で全体
runs.hint | Thin: loss of each step; thick: smoothed; dots: validation. Point for values, drag to zoom.
  | 細い線は各ステップの学習損失、太い線は平滑化したもの、点は検証損失です。ポインターを重ねると値が表示され、ドラッグで拡大できます。
runs.step | Step {step} | ステップ {step}
runs.point | step {step}: {loss}, smoothed {smooth} | ステップ {step}：{loss}（平滑化 {smooth}）
runs.point.val | validation at step {step}: {loss} | ステップ {step} の検証損失：{loss} || runs.samples | Samples | 生成例
runs.no.samples | No samples have been written yet. | 生成例はまだありません。
runs.config | Settings (config.yaml) | 設定（config.yaml）
summary.steps | Steps | ステップ数 || summary.tokens | Tokens | トークン数 || summary.parameters | Parameters | パラメータ数
summary.seconds | Seconds | 所要秒数 || summary.tokens_per_second | Tokens per second | 毎秒のトークン数
summary.mfu | Share of the machine’s peak (MFU) | 計算性能の上限に対する割合（MFU） || summary.val_loss | Validation loss | 検証損失
summary.best_val_loss | Best validation loss | 最良の検証損失 || summary.bits_per_byte | Bits per byte | 1 バイトあたりのビット数
neighbours.pieces | “{text}” is {count} tokens here; shown is one of them. | 「{text}」は {count} トークンに分かれるため、その一つを示します。
tokens.bytes | ⟨…⟩ stands for bytes of a character that is spread over several tokens. | ⟨…⟩ は、複数のトークンに分かれた文字のバイトです。
`.replace(/\n +/g, " "));
